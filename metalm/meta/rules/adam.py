"""Adam, differentiable everywhere."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metalm.meta.parameters import Parameters
from metalm.meta.update_rule import AbstractUpdateRule


class AdamState(NamedTuple):
    """What Adam remembers, for each fast tensor and in its shape."""

    first: Parameters
    """Moving mean of the gradients."""
    second: Parameters
    """Moving mean of their squares."""
    steps: int
    """Steps taken."""


class Adam(AbstractUpdateRule):
    """W <- W - rate (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps), as `torch.optim.Adam`.

    m and v are the moving means of g and g^2 (Kingma and Ba 2015, algorithm 1). Where every
    gradient of a coordinate has been zero, sqrt(v) has no derivative, but the step has: it is
    proportional to g / (|g| + eps) there, with the slope 1 / eps. Autograd's inf * 0 is avoided.

    Args:
        rate: length of a step.
        betas: shares of the old in the moving means.
        eps: what is added to the root.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(
        self, rate: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__()
        if not (rate >= 0.0 and eps > 0.0 and all(0.0 <= beta < 1.0 for beta in betas)):
            raise ValueError(
                "impossible Adam; expected rate >= 0, eps > 0 and betas from 0 to below 1, found "
                f"rate {rate}, eps {eps} and betas {betas}; do change them"
            )
        self.rate, self.betas, self.eps = rate, betas, eps

    def initial_state(self, fast: Parameters) -> AdamState:
        """Zeros."""
        zeros = {name: torch.zeros_like(tensor.detach()) for name, tensor in fast.items()}
        return AdamState(zeros, dict(zeros), 0)

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: AdamState | None,
        coefficients: None = None,
    ) -> tuple[Parameters, AdamState]:
        """One step; see `AbstractUpdateRule.forward`."""
        del slow, coefficients
        state = self.initial_state(fast) if state is None else AdamState(*state)
        steps = state.steps + 1
        beta_1, beta_2 = self.betas
        rate = self.rate / (1 - beta_1**steps)
        root = math.sqrt(1 - beta_2**steps)
        after = AdamState({}, {}, steps)
        new: Parameters = {}
        for name, weight in fast.items():
            gradient = gradients[name]
            first = torch.lerp(state.first[name], gradient, 1 - beta_1)
            second = torch.addcmul(
                beta_2 * state.second[name], gradient, gradient, value=1 - beta_2
            )
            new[name] = torch.addcdiv(weight, first, _root(second) / root + self.eps, value=-rate)
            after.first[name], after.second[name] = first, second
        return new, after


def _root(squares: Tensor) -> Tensor:
    """The square root, with the slope 0 at 0."""
    if not squares.requires_grad:
        return squares.sqrt()
    some = squares > 0
    return torch.where(some, squares, 1.0).sqrt() * some
