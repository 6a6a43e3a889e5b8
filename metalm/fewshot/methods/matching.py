"""Matching networks (Vinyals et al. 2016, arXiv 1606.04080), without full context embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.fewshot.methods.by_class import class_logsumexp
from metalm.fewshot.methods.metric_method import MetricMethod
from metalm.fewshot.methods.pixels import Neighbours

Similarity = Literal["cosine", "euclidean"]


class Matching(MetricMethod):
    """A query attends to the support items, and takes the classes of what it attends to.

        a(x, x_i) = softmax over i of s(f(x), f(x_i))           p(y = k | x) = sum of a over class k

    s is the cosine, times a factor, or minus the squared Euclidean distance. In the paper the
    factor is 1: then no class of twenty can get more than e / (e + 19 / e) = 0.28. By default we
    leave the paper here, and learn the factor from 10 on (our choice).

    Args:
        encoder: pictures -> features.
        statistics: of the encoder's batch normalisation.
        similarity: s.
        factor: of the cosine, at the start.
        learn_factor: its logarithm is a parameter; otherwise it stays as it is.
    """

    def __init__(
        self,
        encoder: nn.Module,
        statistics: str,
        *,
        similarity: Similarity = "cosine",
        factor: float = 10.0,
        learn_factor: bool = True,
    ) -> None:
        super().__init__(encoder, statistics)
        self.similarity = similarity
        log_factor = torch.tensor(float(factor)).log()
        if similarity == "cosine" and learn_factor:
            self.log_factor = nn.Parameter(log_factor)
        else:
            self.register_buffer("log_factor", log_factor)

    def memory(self, features: Tensor, targets: Tensor) -> Neighbours:
        """The embedded support items."""
        return Neighbours(features.flatten(2), targets)

    def compare(self, memory: Neighbours, features: Tensor) -> Tensor:
        """Logarithm of the attention that each class gets, up to a term that all classes share."""
        scores = self._similarities(features.flatten(2), memory.features)
        return class_logsumexp(scores, memory.targets)

    def _similarities(self, query: Tensor, support: Tensor) -> Tensor:
        """s, [tasks, queries, items]."""
        if self.similarity == "cosine":
            cosines = functional.normalize(query, dim=-1) @ functional.normalize(support, dim=-1).mT
            return cosines * self.log_factor.exp()
        return 2 * query @ support.mT - support.square().sum(-1).unsqueeze(1)
