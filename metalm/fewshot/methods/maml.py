"""MAML: weights from which a few steps of gradient descent learn a task (Finn et al. 2017)."""

from __future__ import annotations

from typing import Any

from torch import nn

from metalm.fewshot.methods.adaptation import Adaptation
from metalm.meta.rules import GradientDescent


class Maml(Adaptation):
    """W_{t+1} = W_t - rate dl(W_t; support)/dW_t; the meta-loss is l(W_steps; queries).

    arXiv 1703.03400, algorithm 2. With ``order=1``, FOMAML: the inner gradients count as constants.

    Args:
        network: W_0, meta-learned.
        rate: of the inner steps, on the **mean** loss of the support items. The authors' code sums
            over classes, so that its 0.4 for 5 classes and 0.1 for 20 are both 2.0 here.
        **options: see `Adaptation`.
    """

    def __init__(self, network: nn.Module, *, rate: float, **options: Any) -> None:
        super().__init__(network, **options)
        self.rule = GradientDescent(rate)
