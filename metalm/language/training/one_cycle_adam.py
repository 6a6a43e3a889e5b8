"""Adam under a cycle of four phases (Smith 2018), as fast.ai's Adam experiments have it.

Gugger and Howard 2018 (fast.ai, "AdamW and super-convergence"; sgugger/Adam-experiments,
train_rnn.py). With h the height of the cycle and d the division,

    rate = highest (1 + h (d - 1)) / d        beta1 = upper + h (lower - upper)

    rise   h from 0 to 1        fall   h from 1 to 0
    plateau   h = 1             end    h = 0, the rate goes on to 0 along half a cosine
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from metalm.meta.parameters import Parameters


class CyclePoint(NamedTuple):
    """Where a cycle stands."""

    height: float
    """h, from 0 to 1."""
    annealing: float
    """What multiplies the rate: 1, and less in the last phase."""


def cycle_point(progress: float, phases: Sequence[float]) -> CyclePoint:
    """The cycle after a share of it.

    Args:
        progress: share of the whole that is over, from 0 to 1.
        phases: lengths of rise, plateau, fall and end, in any unit.
    """
    rise, plateau, fall, end = phases
    place = progress * sum(phases)
    if place < rise:
        return CyclePoint(place / rise, 1.0)
    place -= rise
    if place < plateau:
        return CyclePoint(1.0, 1.0)
    place -= plateau
    if place < fall:
        return CyclePoint(1.0 - place / fall, 1.0)
    along = min(1.0, (place - fall) / end) if end > 0 else 0.0
    return CyclePoint(0.0, 0.5 * (1.0 + math.cos(math.pi * along)))


class OneCycleAdam:
    """Steps of Adam with weight decay in the loss (L2, not decoupled).

    Args:
        parameters: trained in place; their gradients are those of the step.
        epochs: length of the cycle.
        learning_rate: the highest.
        weight_decay: L2, added to the gradient after clipping.
        phases: see `cycle_point`.
        division: d.
        momenta: beta1 at the ends (upper) and at the top (lower).
        beta2: of Adam.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        epochs: int,
        learning_rate: float,
        weight_decay: float,
        phases: Sequence[float],
        division: float,
        momenta: tuple[float, float],
        beta2: float,
    ) -> None:
        self._parameters, self._epochs, self._phases = parameters, epochs, tuple(phases)
        self._rate, self._division, self._momenta = learning_rate, division, momenta
        self._beta2 = beta2
        self._optimizer = torch.optim.Adam(
            list(parameters.values()),
            lr=learning_rate,
            betas=(momenta[0], beta2),
            weight_decay=weight_decay,
            fused=all(each.is_cuda for each in parameters.values()),
        )

    def at(self, done: float) -> tuple[float, float]:
        """Learning rate and beta1 after `done` epochs."""
        height, annealing = cycle_point(done / self._epochs, self._phases)
        upper, lower = self._momenta
        rate = self._rate * (1.0 + height * (self._division - 1.0)) / self._division
        return rate * annealing, upper + height * (lower - upper)

    def step(self, done: float, share: float) -> float:
        """One step; returns its learning rate.

        Args:
            done: epochs before it.
            share: of the learning rate, which the window's length asks for.
        """
        rate, momentum = self.at(done)
        rate *= share
        for group in self._optimizer.param_groups:
            group["lr"], group["betas"] = rate, (momentum, self._beta2)
        self._optimizer.step()
        return rate

    @property
    def weights(self) -> Parameters:
        """Those to evaluate."""
        return self._parameters

    def end_epoch(self, loss: float) -> None:
        """Validation decides nothing here."""

    @property
    def result(self) -> Parameters:
        """The last weights."""
        return self._parameters

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the weights."""
        return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._optimizer.load_state_dict(state["optimizer"])
