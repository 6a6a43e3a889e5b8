"""Gradient descent with decay to the slow weights."""

from __future__ import annotations

from collections import defaultdict

from metalm.meta.step_rule import AbstractStepRule, StepSizes


class GradientDescent(AbstractStepRule):
    """W <- W - rate g + decay (W_0 - W), with two numbers that are not learned.

    Args:
        rate: Weight per gradient, >= 0.
        decay: Share of the way back to W_0 at each step, 0 to 1.

    Raises:
        ValueError: A negative rate, or a decay outside [0, 1].
    """

    def __init__(self, rate: float, decay: float = 0.0) -> None:
        super().__init__()
        if not rate >= 0.0:
            raise ValueError(f"impossible rate; expected >= 0, found {rate}; do change it")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"impossible decay; expected 0 to 1, found {decay}; do change it")
        self.rate = rate
        self.decay = decay

    def coefficients(self) -> StepSizes:
        """The same two numbers for every tensor."""
        decay = self.decay if self.decay > 0.0 else None
        return StepSizes(defaultdict(lambda: self.rate), defaultdict(lambda: decay))
