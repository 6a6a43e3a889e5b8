"""Prototypical networks whose prototypes are maps and may be distorted a little."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from metalm.fewshot.methods.by_class import class_means
from metalm.fewshot.methods.elastic_distance import elastic_distance
from metalm.fewshot.methods.metric_method import MetricMethod
from metalm.fewshot.methods.networks import Conv4


class ElasticPrototypical(MetricMethod):
    """Prototypical networks (Snell et al. 2017) with the elastic distance between maps.

        c_k = mean of f(x_i) over the support of class k, places kept
        p(y = k | x) = softmax over k of -s d(f(x), c_k)

    with d of `elastic_distance.py` and a scale s that is learnt; it begins where d, of features as
    large as batch normalisation leaves them, is as wide as that of 64 numbers.

    Args:
        encoder: whose maps are compared.
        statistics: of its batch normalisation, as in `FewShotMethod`.
        reach: in places of the maps.
    """

    def __init__(self, encoder: Conv4, statistics: str, reach: int = 1) -> None:
        super().__init__(encoder, statistics)
        self.reach = reach
        self.log_scale = nn.Parameter(torch.tensor(64 / encoder.num_in_maps).log())

    def embed(self, inputs: Tensor) -> Tensor:
        """Maps [tasks, items, maps, height, width] of inputs [tasks, items, ...]."""
        return self.by_task(cast(Conv4, self.encoder).maps, inputs)

    def memory(self, features: Tensor, targets: Tensor) -> Tensor:
        """Prototypes [tasks, way, maps, height, width]."""
        return class_means(features, targets)

    def compare(self, memory: Tensor, features: Tensor) -> Tensor:
        """-s d(f(x), c_k), [tasks, queries, way]."""
        return -self.log_scale.exp() * elastic_distance(features, memory, self.reach)
