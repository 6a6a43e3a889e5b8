"""Sine curves from few points (Finn et al. 2017, arXiv 1703.03400, section 5.1).

y = A sin(x - phi),  A from 0.1 to 5, phi from 0 to pi, x from -5 to 5, all uniform; the sign of phi
is that of the authors' code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.fewshot.tasks.episodes import Episode

Range = tuple[float, float]


class Curves(NamedTuple):
    """Sine curves.

    Attributes:
        amplitude: A, [curves].
        phase: phi in radians, [curves].
        frequency: radians of the sine a unit of x, [curves].
    """

    amplitude: Tensor
    phase: Tensor
    frequency: Tensor

    def at(self, points: Tensor) -> Tensor:
        """A sin(frequency x - phi) at points [curves, points, 1]; the same shape."""
        amplitude, phase, frequency = (each.view(-1, 1, 1) for each in self)
        return amplitude * (frequency * points - phase).sin()


class SineTasks:
    """Episodes of one curve each; the same seed gives the same, however many are drawn at once.

    Args:
        shot: support points.
        query: query points.
        seed: of the generator.
        amplitude: range of A.
        phase: range of phi; to 2 pi in Reptile's demonstration (Nichol et al. 2018).
        frequency: range; Li et al. 2017 (Meta-SGD) vary it as well.
        points: range of x.

    Raises:
        ValueError: no support point, or no query point.
    """

    def __init__(
        self,
        *,
        shot: int,
        query: int,
        seed: int,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        frequency: Range = (1.0, 1.0),
        points: Range = (-5.0, 5.0),
    ) -> None:
        if shot < 1 or query < 1:
            raise ValueError(
                "this is no task; expected at least 1 support and 1 query point, found "
                f"{shot} and {query}; choose larger numbers"
            )
        self.shot, self.query = shot, query
        self.ranges = (amplitude, phase, frequency)
        self.points = points
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Curves, Episode]:
        """The next `count` curves, and their points and values, each [count, points, 1]."""
        numbers = torch.stack(
            [torch.rand(3 + self.shot + self.query, generator=self.generator) for _ in range(count)]
        )
        curves = Curves(
            *(_spread(numbers[:, i], each) for i, each in enumerate(self.ranges)),
        )
        points = _spread(numbers[:, 3:, None], self.points)
        support, query = points.split([self.shot, self.query], 1)
        return curves, Episode(support, curves.at(support), query, curves.at(query))

    def sample(self, count: int) -> Episode:
        """The next `count` tasks."""
        return self.draw(count)[1]

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the tasks with this state stood."""
        self.generator.set_state(state["generator"])


def _spread(numbers: Tensor, limits: Range) -> Tensor:
    """Numbers in [0, 1) brought into a range."""
    low, high = limits
    return low + (high - low) * numbers
