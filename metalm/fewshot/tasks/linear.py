"""Straight lines (planes) from few points: tasks whose best answer is known in closed form.

    y = w x + b + noise,   w, b ~ N(0, spread^2),   x ~ N(0, 1),   noise ~ N(0, noise^2)

The best guess in squared error is the posterior mean: ridge regression with the penalty
noise^2 / spread^2. Its expected error is known too, so that no method can honestly score less.

So any method for regression can be scored on these episodes beside that oracle
(`methods/posterior_mean.py`), and an honest one stays above `bayes_error`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.fewshot.tasks.episodes import Episode

SPREAD, NOISE = 1.0, 0.1
"""Standard deviations of the tasks that the command line offers."""


class Lines(NamedTuple):
    """Straight lines, or planes."""

    weights: Tensor
    """w, then b, [lines, inputs + 1, 1]."""

    def at(self, points: Tensor) -> Tensor:
        """The values, without noise, at points [lines, points, inputs]: [lines, points, 1]."""
        return with_one(points) @ self.weights


class LinearTasks:
    """Episodes of one line each; the same seed gives the same, however many are drawn at once.

    Args:
        inputs: numbers of a point.
        shot: support points.
        query: query points.
        seed: of the generator.
        spread: standard deviation of the weights and of the constant.
        noise: standard deviation of what is added to the values.

    Raises:
        ValueError: there is nothing to draw, or the oracle would have no finite answer.
    """

    def __init__(
        self,
        *,
        inputs: int = 1,
        shot: int,
        query: int,
        seed: int,
        spread: float = SPREAD,
        noise: float = NOISE,
    ) -> None:
        if min(inputs, shot, query) < 1 or spread <= 0 or noise <= 0:
            raise ValueError(
                "these are no tasks; expected at least 1 input, support and query point, and "
                f"positive deviations, found inputs {inputs}, shot {shot}, query {query}, spread "
                f"{spread}, noise {noise}; choose larger numbers"
            )
        self.inputs, self.shot, self.query = inputs, shot, query
        self.spread, self.noise = spread, noise
        self.points = (-3.0, 3.0)  # where pictures show a line; few points lie beyond
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Lines, Episode]:
        """The next `count` lines; points [count, points, inputs], values [count, points, 1]."""
        points = self.shot + self.query
        sizes = [self.inputs + 1, points * self.inputs, points]
        numbers = torch.stack(
            [torch.randn(sum(sizes), generator=self.generator) for _ in range(count)]
        )
        weights, flat, errors = numbers.split(sizes, 1)
        x = flat.unflatten(1, (points, self.inputs))
        lines = Lines(self.spread * weights.unsqueeze(2))
        y = lines.at(x) + self.noise * errors.unsqueeze(2)
        shot = self.shot
        return lines, Episode(x[:, :shot], y[:, :shot], x[:, shot:], y[:, shot:])

    def sample(self, count: int) -> Episode:
        """The next `count` tasks."""
        return self.draw(count)[1]

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the tasks with this state stood."""
        self.generator.set_state(state["generator"])


def with_one(points: Tensor) -> Tensor:
    """Points [..., inputs] with a 1 after them, [..., inputs + 1]: the constant's input."""
    return torch.cat([points, torch.ones_like(points[..., :1])], -1)


def bayes_answers(
    support_inputs: Tensor, support_targets: Tensor, query_inputs: Tensor, *, ridge: float
) -> Tensor:
    """Posterior mean of the query values: the least expected squared error that is possible.

        w = (X'X + ridge I)^-1 X'y,   ridge = noise^2 / spread^2

    Args:
        support_inputs: [tasks, shot, inputs].
        support_targets: [tasks, shot, 1].
        query_inputs: [tasks, query, inputs].
        ridge: the penalty.

    Returns:
        [tasks, query, 1].
    """
    x = with_one(support_inputs)
    weights = torch.linalg.solve(_precision(x, ridge), x.mT @ support_targets)
    return with_one(query_inputs) @ weights


def bayes_error(
    support_inputs: Tensor, query_inputs: Tensor, *, spread: float, noise: float
) -> Tensor:
    """Expected squared error of `bayes_answers` at these points, the query's noise included.

        noise^2 (1 + x (X'X + ridge I)^-1 x')

    Returns:
        [tasks, query, 1].
    """
    x, query = with_one(support_inputs), with_one(query_inputs)
    covariance = torch.linalg.solve(_precision(x, (noise / spread) ** 2), query.mT)
    return noise**2 * (1 + (query * covariance.mT).sum(-1, keepdim=True))


def _precision(x: Tensor, ridge: float) -> Tensor:
    return x.mT @ x + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
