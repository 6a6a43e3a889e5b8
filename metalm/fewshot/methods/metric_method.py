"""What the metric methods share: embed, remember the support set, answer queries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.fewshot.methods.method import FewShotMethod, MetaStep, accuracy, evaluation
from metalm.fewshot.tasks.episodes import Episode


class MetricMethod(FewShotMethod):
    """A method without inner updates: one memory of the support set answers any number of queries.

    With running statistics, support and queries are embedded together in meta-training, so that
    both are normalised alike, as they are by the running statistics when queries are answered. With
    transductive statistics every task is embedded for itself, support and queries apart, in
    meta-training as in use.

    Args:
        encoder: [pictures, channels, height, width] -> [pictures, ...].
        statistics: of the encoder's batch normalisation, as in `FewShotMethod`.
    """

    def __init__(self, encoder: nn.Module, statistics: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.statistics = statistics

    def remember(self, support_inputs: Tensor, support_targets: Tensor) -> Any:
        """The memory of a support set [tasks, way * shot, ...]; see `answer`."""
        return self.memory(self.embed(support_inputs), support_targets)

    def answer(self, memory: Any, query_inputs: Tensor) -> Tensor:
        """Logits [tasks, queries, way] of queries [tasks, queries, ...], each for itself."""
        return self.compare(memory, self.embed(query_inputs))

    @abstractmethod
    def memory(self, features: Tensor, targets: Tensor) -> Any:
        """The memory of embedded support items [tasks, items, ...] with targets [tasks, items]."""

    @abstractmethod
    def compare(self, memory: Any, features: Tensor) -> Tensor:
        """Logits [tasks, queries, way] of embedded queries [tasks, queries, ...]."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the queries, nats, mean; logits [tasks, queries, way]."""
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def embed(self, inputs: Tensor) -> Tensor:
        """Features [tasks, items, ...] of inputs [tasks, items, ...]."""
        return self.by_task(self.encoder, inputs)

    def by_task(self, module: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """A module on [tasks, items, ...]: task by task where it looks at batch statistics."""
        if self.statistics == "transductive":
            return torch.stack([module(task) for task in inputs])
        return module(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])

    def embed_both(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Features of the support and of the queries, as meta-training wants them."""
        support, query = episode.support_inputs, episode.query_inputs
        if self.statistics == "transductive":
            return self.embed(support), self.embed(query)
        features = self.embed(torch.cat([support, query], 1))
        num_support = support.shape[1]
        return features[:, :num_support], features[:, num_support:]

    def meta_loss(
        self, support: Tensor, support_targets: Tensor, query: Tensor, query_targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The meta-loss, and the logits of the queries, of features that are embedded already.

        Args:
            support: [tasks, way * shot, ...].
            support_targets: [tasks, way * shot].
            query: [tasks, queries, ...].
            query_targets: [tasks, queries].

        Returns:
            Mean over tasks and queries, a scalar in the method's own unit; [tasks, queries, way].
        """
        logits = self.compare(self.memory(support, support_targets), query)
        return self.loss(logits, query_targets), logits

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """One forward and one backward pass over all tasks."""
        support, query = self.embed_both(episode)
        loss, logits = self.meta_loss(
            support, episode.support_targets, query, episode.query_targets
        )
        if loss.requires_grad:
            loss.backward()
        return MetaStep(float(loss.detach()), accuracy(logits.detach(), episode.query_targets))

    @torch.no_grad()
    def predict(
        self, support_inputs: Tensor, support_targets: Tensor, query_inputs: Tensor
    ) -> Tensor:
        """Logits [tasks, queries, way] of the queries."""
        with evaluation(self):
            return self.answer(self.remember(support_inputs, support_targets), query_inputs)
