"""Meta-SGD: a learned rate for every coordinate, of either sign."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metalm.meta.rules.statistics import key
from metalm.meta.step_rule import AbstractStepRule, StepSizes


class CoordinateRates(AbstractStepRule):
    """W <- W - s g, s ``[*shape]`` learned beside W_0 (Li et al. 2017, arXiv 1707.09835, eq. 2).

    Unlike those of `LearnedRates` these rates may change their sign, and need no statistics.

    Args:
        slow: the parameters that learn; every coordinate gets a rate.
        rate: of all coordinates at the start.
    """

    def __init__(self, slow: Mapping[str, Tensor], rate: float) -> None:
        super().__init__()
        self.names = tuple(slow)
        for name, tensor in slow.items():
            start = torch.full_like(tensor.detach(), rate, memory_format=torch.contiguous_format)
            self.register_parameter(key(name), nn.Parameter(start))

    def coefficients(self) -> StepSizes:
        """The rates, and no decay."""
        rates: dict[str, Tensor] = {name: getattr(self, key(name)) for name in self.names}
        return StepSizes(rates, dict.fromkeys(self.names))
