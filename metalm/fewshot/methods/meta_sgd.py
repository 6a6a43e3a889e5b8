"""Meta-SGD: MAML that learns a rate for every weight, beside the weights (Li et al. 2017)."""

from __future__ import annotations

from typing import Any

from torch import nn

from metalm.fewshot.methods.adaptation import Adaptation
from metalm.meta.rules import CoordinateRates


class MetaSgd(Adaptation):
    """W_{t+1} = W_t - s dl(W_t; support)/dW_t, with s of the shape of W meta-learned too.

    arXiv 1707.09835, algorithm 1, which has one step. The rates are learned at either order.

    Args:
        network: W_0, meta-learned.
        rate: all of s at the start; the paper draws one number from 0.005 to 0.1.
        **options: see `Adaptation`.
    """

    def __init__(self, network: nn.Module, *, rate: float, **options: Any) -> None:
        super().__init__(network, **options)
        learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.rule = CoordinateRates(learning, rate)
