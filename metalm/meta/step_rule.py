"""Rules of the form W <- W - s g + rho (W_0 - W), which differ in where s and rho come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch

from metalm.meta.elementwise_step import Number, step, write_step
from metalm.meta.parameters import Parameters
from metalm.meta.update_rule import AbstractUpdateRule, RuleState


class StepSizes(NamedTuple):
    """What multiplies g and W_0 - W, for each fast tensor; differentiable to phi."""

    rates: Mapping[str, Number]
    """s, broadcastable to the tensor, in units of weight per gradient."""
    decays: Mapping[str, Number | None]
    """rho, broadcastable to the tensor, the share of the way back to W_0; None for no decay."""


class AbstractStepRule(AbstractUpdateRule):
    """W <- W - s g + rho (W_0 - W); a subclass gives s and rho as its `coefficients` and no more.

    `unroll` differentiates these rules in closed form from their coefficients (`step_sweep.py`), so
    a rule that needs a `forward` of its own belongs under `AbstractUpdateRule`.
    """

    @abstractmethod
    def coefficients(self) -> StepSizes:
        """Give s and rho of every fast tensor."""

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: StepSizes | None = None,
    ) -> tuple[Parameters, RuleState]:
        """One step, out of place; see `AbstractUpdateRule.forward`."""
        rates, decays = self.coefficients() if coefficients is None else coefficients
        new = {
            name: step(weight, gradients[name], slow[name], rates[name], decays[name])
            for name, weight in fast.items()
        }
        return new, state

    @torch.no_grad()
    def update_(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: StepSizes | None = None,
    ) -> RuleState:
        """The same step in place; see `AbstractUpdateRule.update_`."""
        rates, decays = self.coefficients() if coefficients is None else coefficients
        for name, weight in fast.items():
            write_step(weight, weight, gradients[name], slow[name], rates[name], decays[name])
        return state
