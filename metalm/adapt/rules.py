"""Update rules for a model of your own: gradient statistics, Krause's rule, and a learned one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from metalm.adapt.module_loss import Segment
from metalm.adapt.reader import AdaptiveReader, evaluating
from metalm.adapt.text_rows import Memory, TextRow, of_the_vocabulary, token_ids
from metalm.adapt.token_losses import token_nats
from metalm.meta.forward_mode import initial_traces
from metalm.meta.gradient_statistics import GradientStatistics
from metalm.meta.meta_gradient import Mode
from metalm.meta.parameters import Parameters
from metalm.meta.rules.learned_rates import Granularity, LearnedRates
from metalm.meta.rules.statistics import mean_over_tensors
from metalm.meta.segment_length import Segment as Checkpoints
from metalm.meta.tree import detach
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule


@torch.inference_mode(False)
def count_gradients(
    reader: AdaptiveReader, texts: Sequence[ArrayLike | Tensor], *, streams: int = 100
) -> Parameters:
    """RMS over segments of the gradient of a segment's mean token loss, nothing being learnt.

    As Krause et al. (2018) have it: the texts are laid end to end, cut into parallel streams, and
    read in segments with the model's state carried; a segment of all streams is one batch.

    Args:
        reader: the model, its fast weights and its segments; the rule plays no part.
        texts: training texts, integers [tokens] each.
        streams: parallel streams, fewer if there is little text; 1 if the model takes no batches.

    Returns:
        RMS of each fast parameter, [*shape], in nats per token and unit of weight.

    Raises:
        ValueError: no text, too little, or a token beyond the vocabulary.
    """
    if not texts:
        raise ValueError("there is no text; expected at least one to count on, found 0; do give it")
    parts = [token_ids(text, reader.device) for text in texts]
    before = [] if reader.start_token is None else [parts[0].new_tensor([reader.start_token])]
    tokens = torch.cat([*before, *parts])
    streams = max(1, min(streams, len(tokens) // (4 * reader.segment)))
    length = (len(tokens) - 1) // streams
    if length < 1:
        raise ValueError(
            f"too little text; expected at least {streams + 1} tokens, found {len(tokens)}; count "
            "on more of the training text"
        )
    inputs = tokens[: streams * length].view(streams, length)
    targets = tokens[1 : streams * length + 1].view(streams, length)
    state = None if reader.initial_state is None else reader.initial_state(streams)
    statistics = GradientStatistics()
    with evaluating(reader.model), torch.enable_grad():
        for start in range(0, length, reader.segment):
            part = slice(start, start + reader.segment)
            leaves = {name: weight.clone().requires_grad_() for name, weight in reader.slow.items()}
            with of_the_vocabulary(targets[:, part]):
                logits, state = reader.loss.logits(
                    {**reader.rest, **leaves}, inputs[:, part], state
                )
                loss = token_nats(logits, targets[:, part]).mean()
            gradients = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            statistics.add(dict(zip(leaves, gradients, strict=True)))
            state = detach(state)
    return statistics.rms()


def krause_rule(
    rms: Parameters,
    rate: float = 2e-4,
    decay: float = 1e-3,
    eps: float = 0.7,
    granularity: Granularity = "tensor",
) -> LearnedRates:
    """The RMS rule of Krause et al. (2018), from which `learn_rule` can go on.

    The defaults are where the search on WikiText-2 begins; they want tuning on text of your own.

    Args:
        rms: what `count_gradients` gave.
        rate: weight per (gradient over RMS).
        decay: share of the way back to W_0 at each update, where the RMS is the mean one.
        eps: added to the RMS, in units of its mean over tensors.
        granularity: what has a rate and a decay of its own once they are learned.

    Raises:
        ValueError: numbers out of range, or statistics that are not finite or all zero.
    """
    mean = float(mean_over_tensors(rms))
    return LearnedRates.from_krause(rms, rate, decay, eps * mean, granularity).requires_grad_(False)


@torch.inference_mode(False)
def learn_rule(
    reader: AdaptiveReader,
    texts: Sequence[ArrayLike | Tensor],
    *,
    steps: int,
    unrolled: int = 8,
    learning_rate: float = 0.03,
    clip: float = 1.0,
    order: int = 1,
    mode: Mode = "reverse",
    checkpoints: Checkpoints | None = None,
) -> list[float]:
    """Trains the reader's rule by reading, with the model frozen; the rule is changed in place.

    The meta-gradient of the mean loss of `unrolled` segments reaches the rule through their
    updates; then the history is cut, and reading goes on. In forward mode it is never cut. The
    texts should be others than those that the model was trained on, which it knows too well to need
    to learn from.

    Args:
        reader: with a rule that has parameters, such as `krause_rule` gives.
        texts: token ids, integers [tokens] each; read again and again, in their order, each with
            fresh memories.
        steps: of Adam.
        unrolled: segments a step.
        learning_rate: of Adam.
        clip: highest norm of the meta-gradient.
        order: of the meta-gradient, see `metalm.meta.unroll.unroll`.
        mode: "reverse", or "forward" for rules of rates and decays: the horizon is the whole text.
        checkpoints: at order 2 or in reverse mode, the `segment` of `unroll`, for less memory.

    Returns:
        The mean loss of each step, in nats per token.

    Raises:
        ValueError: a rule with nothing to learn, or that does not fit the order and mode;
            impossible numbers; no text, or none so long that an update precedes a loss.
    """
    rule = reader.rule
    if rule is None or not list(rule.parameters()):
        raise ValueError(
            "there is nothing to learn in this rule; expected one with parameters, found "
            f"{type(rule).__name__}; begin with krause_rule"
        )
    least = 1 if mode == "forward" else 2
    if steps < 1 or unrolled < least:
        raise ValueError(
            "a rule is learnt from losses that follow updates; expected at least 1 step of "
            f"{least} segments, found {steps} of {unrolled}; ask for more"
        )
    if order not in (1, 2):
        raise ValueError(
            f"a rule is learnt from a meta-gradient; expected order 1 or 2, found {order}; do "
            "change it"
        )
    for name, number in (("learning_rate", learning_rate), ("clip", clip)):
        if not 0.0 < number < math.inf:
            raise ValueError(
                f"impossible {name}; expected a finite number > 0, found {number}; do change it"
            )
    windows = _windows(reader, [token_ids(text, reader.device) for text in texts], unrolled)
    required = [parameter.requires_grad for parameter in rule.parameters()]
    rule.requires_grad_(True)
    learning = _Learning(
        reader,
        rule,
        torch.optim.Adam(rule.parameters(), lr=learning_rate),
        clip,
        {"order": order, "mode": mode, "segment": checkpoints},
    )
    try:
        with evaluating(reader.model), torch.enable_grad():
            return [learning.step(*next(windows)) for _ in range(steps)]
    finally:
        learning.optimizer.zero_grad(set_to_none=True)
        for parameter, value in zip(rule.parameters(), required, strict=True):
            parameter.requires_grad_(value)


def _windows(
    reader: AdaptiveReader, texts: Sequence[Tensor], unrolled: int
) -> Iterator[tuple[TextRow, list[Segment]]]:
    """The next segments of the texts, again and again; each text in a row with its memory."""
    longest = max((TextRow(text, reader.start()).left for text in texts), default=0)
    if longest <= reader.segment:
        raise ValueError(
            "no loss follows an update in these texts; expected one of more than a segment, "
            f"{reader.segment} tokens to score, found {len(texts)} texts of at most {longest}; "
            "give longer ones, or a reader of shorter segments"
        )
    return _endless(reader, texts, unrolled)


def _endless(
    reader: AdaptiveReader, texts: Sequence[Tensor], unrolled: int
) -> Iterator[tuple[TextRow, list[Segment]]]:
    for text in itertools.cycle(texts):
        row = TextRow(text, reader.start())
        while row.left > 0:
            yield row, [row.take(reader.segment) for _ in range(unrolled) if row.left > 0]


@dataclass
class _Learning:
    """Steps of the optimiser along the texts."""

    reader: AdaptiveReader
    rule: AbstractUpdateRule
    optimizer: torch.optim.Optimizer
    clip: float
    way: dict[str, Any]
    """Order, mode and checkpoints of the meta-gradient."""
    row: TextRow | None = None
    traces: Parameters | None = None
    """What forward mode carries along the row."""

    def step(self, row: TextRow, batches: list[Segment]) -> float:
        """One step of the optimiser; the row goes on from where its updates ended."""
        reader, forward = self.reader, self.way["mode"] == "forward"
        if forward and row is not self.row:
            self.row, self.traces = row, initial_traces(self.rule, row.memory.fast)
        tokens = sum(len(batch.targets) for batch in batches)
        with of_the_vocabulary(torch.cat([batch.targets for batch in batches])):
            after = unroll(
                reader.loss,
                self.rule,
                reader.slow,
                reader.rest,
                batches,
                row.memory.model_state,
                fast=row.memory.fast,
                rule_state=row.memory.rule_state,
                truncate=True,
                weights=[reader.segment / tokens] * len(batches),
                apart=reader.surprise > 0.0,
                traces=self.traces,
                **self.way,
            ).cut()
        if forward or len(batches) > 1:  # otherwise no update precedes a loss
            self.optimizer.zero_grad(set_to_none=True)
            after.meta_loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.rule.parameters(), self.clip)
            if bool(norm.isfinite()):
                self.optimizer.step()
        row.memory, self.traces = Memory(after.fast, after.rule_state, after.state), after.traces
        if not all(bool(weight.sum().isfinite()) for weight in row.memory.fast.values()):
            row.fall_back(reader.start())
            self.row = None  # and fresh traces
        return after.meta_loss.item()
