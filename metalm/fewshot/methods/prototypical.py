"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175)."""

from __future__ import annotations

from torch import Tensor

from metalm.fewshot.methods.by_class import class_means
from metalm.fewshot.methods.metric_method import MetricMethod


class Prototypical(MetricMethod):
    """A class is the mean of its embedded support; a query belongs to the nearest.

        c_k = mean of f(x_i) over the support of class k
        p(y = k | x) = softmax over k of -|f(x) - c_k|^2          (equations 1 and 2)

    The logits leave out |f(x)|^2, which all classes of a query share.
    """

    def memory(self, features: Tensor, targets: Tensor) -> Tensor:
        """Prototypes [tasks, way, numbers]."""
        return class_means(features.flatten(2), targets)

    def compare(self, memory: Tensor, features: Tensor) -> Tensor:
        """2 f(x) c_k - |c_k|^2, [tasks, queries, way]."""
        return 2 * features.flatten(2) @ memory.mT - memory.square().sum(-1).unsqueeze(1)
