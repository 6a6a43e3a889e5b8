"""Rows that take steps of different sizes: several rules of the form W - s g + rho (W_0 - W)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metalm.meta.elementwise_step import step, write_step
from metalm.meta.parameters import Parameters
from metalm.meta.step_rule import StepSizes
from metalm.meta.update_rule import AbstractUpdateRule, Coefficients, RuleState


class SideBySide(AbstractUpdateRule):
    """Row r of the fast weights takes the steps of sizes r, so that one batch compares rules.

    Args:
        sizes: what `AbstractStepRule.coefficients` gave for each row, in the order of the rows; not
            learned here.

    Raises:
        ValueError: No sizes at all.
    """

    def __init__(self, sizes: Sequence[StepSizes]) -> None:
        super().__init__()
        if not sizes:
            raise ValueError(
                "no step sizes; expected those of at least one row, found 0; do give some"
            )
        self._sizes = tuple(sizes)

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: Coefficients = None,
    ) -> tuple[Parameters, RuleState]:
        """One step, out of place; see `AbstractUpdateRule.forward`.

        Raises:
            ValueError: Another number of rows than of sizes.
        """
        del coefficients
        new = {
            name: torch.stack(
                [
                    step(weight[row], gradients[name][row], slow[name], rates[name], decays[name])
                    for row, (rates, decays) in self._numbered(weight.shape[0])
                ]
            )
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
        coefficients: Coefficients = None,
    ) -> RuleState:
        """The same step in place; see `AbstractUpdateRule.update_`."""
        del coefficients
        for name, weight in fast.items():
            for row, (rates, decays) in self._numbered(weight.shape[0]):
                write_step(
                    weight[row],
                    weight[row],
                    gradients[name][row],
                    slow[name],
                    rates[name],
                    decays[name],
                )
        return state

    def _numbered(self, rows: int) -> list[tuple[int, StepSizes]]:
        if rows != len(self._sizes):
            raise ValueError(
                f"each row has its own step sizes; expected {len(self._sizes)} rows, found {rows}; "
                "do let all rows begin and end together"
            )
        return list(enumerate(self._sizes))
