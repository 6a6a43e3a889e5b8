"""SNAIL (Mishra et al. 2018, arXiv 1707.03141): a task read as a sequence, the query last.

Each step sees the steps before it and itself alone: through convolutions of two taps with growing
distance, and through attention. Therefore nothing that comes from the support depends on a query:
the support is read once, and every query is one more step after it, for itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.fewshot.methods.metric_method import MetricMethod


class CausalLayer(nn.Module, ABC):
    """A layer over time whose step t depends on the steps up to t; adds numbers to its input."""

    @abstractmethod
    def forward(self, steps: Tensor) -> Tensor:
        """[sequences, time, numbers] -> [sequences, time, more numbers]."""

    @abstractmethod
    def follow(self, past: Tensor, last: Tensor) -> Tensor:
        """What the layer makes of one more step, for many alternatives of it.

        Args:
            past: steps of the past, [sequences, time, numbers].
            last: alternatives of the next step, [sequences, alternatives, numbers].

        Returns:
            [sequences, alternatives, more numbers].
        """


class DenseBlock(CausalLayer):
    """Causal convolution of two taps, `dilation` apart, with a gate; added to its input.

        [x_t, tanh(a_t) sigmoid(b_t)],  a_t and b_t linear in x_t and x_{t - dilation}

    Before the first step there are zeros.
    """

    def __init__(self, numbers: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.now = nn.Linear(numbers, 2 * filters)
        self.then = nn.Linear(numbers, 2 * filters, bias=False)

    def forward(self, steps: Tensor) -> Tensor:
        """All steps at once."""
        length = steps.shape[1]
        earlier = functional.pad(steps, (0, 0, self.dilation, 0))[:, :length]
        return self._joined(steps, self.now(steps) + self.then(earlier))

    def follow(self, past: Tensor, last: Tensor) -> Tensor:
        """One more step."""
        before = past.shape[1] - self.dilation
        sums = self.now(last)
        if before >= 0:
            sums = sums + self.then(past[:, before]).unsqueeze(1)
        return self._joined(last, sums)

    def _joined(self, steps: Tensor, sums: Tensor) -> Tensor:
        values, gates = sums.chunk(2, -1)
        return torch.cat([steps, values.tanh() * gates.sigmoid()], -1)


class AttentionBlock(CausalLayer):
    """[x_t, sum over s <= t of p_ts v_s],  p_ts = softmax over s <= t of q_t k_s / sqrt(keys)."""

    def __init__(self, numbers: int, keys: int, values: int) -> None:
        super().__init__()
        self.queries = nn.Linear(numbers, keys)
        self.keys = nn.Linear(numbers, keys)
        self.values = nn.Linear(numbers, values)
        self.scale = keys**-0.5

    def forward(self, steps: Tensor) -> Tensor:
        """All steps at once."""
        length = steps.shape[1]
        scores = self.scale * self.queries(steps) @ self.keys(steps).mT
        future = torch.ones(length, length, dtype=torch.bool, device=steps.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.cat([steps, weights @ self.values(steps)], -1)

    def follow(self, past: Tensor, last: Tensor) -> Tensor:
        """One more step: it attends to the past and to itself."""
        queries = self.scale * self.queries(last)
        to_past = queries @ self.keys(past).mT
        to_itself = (queries * self.keys(last)).sum(-1, keepdim=True)
        weights = torch.cat([to_past, to_itself], -1).softmax(-1)
        read = weights[..., :-1] @ self.values(past) + weights[..., -1:] * self.values(last)
        return torch.cat([last, read], -1)


# Keys and values of the three attention blocks, and filters of the convolutions between them: the
# paper's network for few-shot classification.
ATTENTION = ((64, 32), (256, 128), (512, 256))
FILTERS = 128


def causal_layers(numbers: int, length: int) -> tuple[list[CausalLayer], int]:
    """The layers of the paper's network for few-shot classification, for sequences of `length`.

    An attention block, then twice convolutions and an attention block. Convolutions come in
    ceil(log2 length) dense blocks, of dilation 2, 4, 8, ...

    Returns:
        The layers, and the numbers a step has after them.
    """
    layers: list[CausalLayer] = []
    for keys, values in ATTENTION:
        if layers:
            for power in range(1, math.ceil(math.log2(length)) + 1):
                layers.append(DenseBlock(numbers, FILTERS, 2**power))
                numbers += FILTERS
        layers.append(AttentionBlock(numbers, keys, values))
        numbers += values
    return layers, numbers


class SupportTrace(NamedTuple):
    """What every layer of the network saw of the support, each [tasks, items, numbers]."""

    layers: tuple[Tensor, ...]


class Snail(MetricMethod):
    """The support is a sequence of features with their labels; a query comes last, without.

    As published, the length of the sequence is fixed when the network is made (it decides the
    number of layers); shorter sequences are read by the same layers, as in the paper's training
    with 1 to 5 shots.

    Args:
        encoder: pictures -> [pictures, num_features]; 64 in the paper.
        statistics: of the encoder's batch normalisation.
        num_features: see above.
        way: classes of every task.
        max_shot: most shots of a task.
    """

    def __init__(
        self,
        encoder: nn.Module,
        statistics: str,
        *,
        num_features: int,
        way: int,
        max_shot: int,
    ) -> None:
        super().__init__(encoder, statistics)
        self.way = way
        layers, numbers = causal_layers(num_features + way, way * max_shot + 1)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(numbers, way)

    def memory(self, features: Tensor, targets: Tensor) -> SupportTrace:
        """The support read in the order given.

        Raises:
            ValueError: the task has more classes than the network was made for.
        """
        if int(targets.max()) >= self.way:
            raise ValueError(
                f"the task does not fit the network; expected {self.way} classes, found target "
                f"{int(targets.max())}; make a network for as many ways as the tasks have"
            )
        labels = functional.one_hot(targets, self.way).to(features.dtype)
        steps = torch.cat([features.flatten(2), labels], -1)
        trace = [steps]
        for layer in self._causal()[:-1]:
            steps = layer(steps)
            trace.append(steps)
        return SupportTrace(tuple(trace))

    def compare(self, memory: SupportTrace, features: Tensor) -> Tensor:
        """Logits [tasks, queries, way], each query the only one after the support."""
        features = features.flatten(2)
        last = torch.cat([features, features.new_zeros(*features.shape[:2], self.way)], -1)
        for layer, past in zip(self._causal(), memory.layers, strict=True):
            last = layer.follow(past, last)
        return self.head(last)

    def _causal(self) -> list[CausalLayer]:
        return cast("list[CausalLayer]", list(self.layers))
