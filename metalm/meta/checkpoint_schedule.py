"""Where an unroll keeps checkpoints, so that a backward pass through all its steps fits in memory.

The backward pass goes through parts of the steps, the last first. To come to a part, the steps
before it are passed over from a checkpoint, and what was passed over waits as parts of its own.
While d parts wait and the graph of k steps is there, memory holds

    max(d - 1, 0) P + k A

P bytes a checkpoint (the first part begins where the unroll does, with weights that are there
anyway) and A bytes of graph a step. A part that waits gives its checkpoint up when its turn comes,
so parts early in the unroll may be longer, and may be cut again. What is passed over is taken once
more than without checkpoints; the number of such steps to go back through n with d parts waiting is

    cost(n, d) = 0 where the graph of n steps fits
               = min over m of  m + cost(n - m, d + 1) + cost(m, d)

Where a last loss is only scored, its graph may come first and alone, and all steps before it are
passed over; or together with the last part of the steps.

With graphs of one step each this is the schedule of Griewank and Walther (2000), "Algorithm 799:
revolve".
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache
from itertools import takewhile
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# A longer unroll is planned in so many units of steps, since planning takes the cube of them.
_UNITS = 128


class Schedule(Protocol):
    """How a part of the unroll is taken."""

    def passed(self, steps: int, waiting: int, first: bool) -> int:
        """How many steps to pass over before the next checkpoint; 0 for taking the graph of all.

        Args:
            steps: of the part.
            waiting: parts that wait already.
            first: whether no graph has been gone through yet.
        """


class Every(NamedTuple):
    """A checkpoint every so many steps."""

    length: int

    def passed(self, steps: int, waiting: int, first: bool) -> int:
        """See `Schedule.passed`."""
        del waiting, first
        return self.length if steps > self.length else 0


class StepBytes(NamedTuple):
    """What one step of an unroll keeps, in bytes."""

    graph: int
    """A, until the backward pass has gone through the step; it is freed with its part."""
    checkpoint: int
    """P, at the start of each part that waits, but the first."""


class Fitting:
    """The schedule that passes over the fewest steps among those that hold at most so many bytes.

    Args:
        steps: of the unroll.
        each: what a step keeps.
        held: bytes for checkpoints and graph together.
        spare: steps that the first graph may have more, since no gradient of later weights is in
            memory beside it.
        scored: whether a loss comes after them that is not learnt from, and its graph comes alone.
    """

    def __init__(
        self, steps: int, each: StepBytes, held: int, spare: int = 0, scored: bool = False
    ) -> None:
        self.unit = math.ceil(steps / _UNITS)
        units = math.ceil(steps / self.unit)
        graphs = _graphs(units, each._replace(graph=each.graph * self.unit), held)
        self._cuts, cost = _cheapest(units, graphs, spare // self.unit)
        self.cost = cost * self.unit
        """Steps that are passed over; infinite where nothing fits."""
        if scored and 0 < self.cost < math.inf:
            self.cost += self._last(steps)

    def passed(self, steps: int, waiting: int, first: bool) -> int:
        """See `Schedule.passed`."""
        return int(self._cuts[int(first), waiting, math.ceil(steps / self.unit)]) * self.unit

    def _last(self, steps: int) -> int:
        """Steps of the part whose graph comes first."""
        waiting = 0
        while length := self.passed(steps, waiting, first=False):
            steps, waiting = steps - length, waiting + 1
        return steps


@cache
def fitting(
    steps: int, each: StepBytes, held: int, spare: int = 0, scored: bool = False
) -> Fitting:
    """The same schedule for the same unroll, planned once; see `Fitting`."""
    return Fitting(steps, each, held, spare, scored)


@cache
def least_held(
    steps: int, each: StepBytes, passes: float, spare: int = 0, scored: bool = False
) -> int:
    """The fewest bytes with which steps are passed over so often at most, on average.

    Args:
        steps: of the unroll.
        each: what a step keeps.
        passes: how often.
        spare: see `Fitting`.
        scored: see `Fitting`.
    """
    unit = math.ceil(steps / _UNITS)
    units = math.ceil(steps / unit)
    graph, everything = each.graph * unit, each.graph * unit * units
    sizes = {
        size
        for length in range(1, units + 1)
        for waiting in range(units)
        if (size := waiting * each.checkpoint + length * graph) <= everything
    }
    # With less memory the cost never falls; with the most it is 0.
    ordered = sorted(sizes)

    def fits(held: int) -> bool:
        return Fitting(steps, each, held, spare, scored).cost <= passes * steps

    return ordered[bisect_left(ordered, True, key=fits)]


def _graphs(units: int, each: StepBytes, held: int) -> list[int]:
    """How many units a graph may have with 0, 1, 2, ... parts waiting, as long as one has room."""
    if each.graph == 0:
        return [units]
    rooms = (held - max(waiting - 1, 0) * each.checkpoint for waiting in range(units + 1))
    lengths = (min(room // each.graph, units) for room in rooms)
    return list(takewhile(lambda length: length > 0, lengths))


def _cheapest(units: int, graphs: list[int], spare: int) -> tuple[NDArray[np.int64], float]:
    """The best m, 0 for a graph, and the cost of the whole.

    The first is an array over (whether the graph is the first one, parts waiting, units).
    """
    deepest = len(graphs)
    costs = np.full((2, deepest + 1, units + 1), np.inf)  # nothing can wait beyond the deepest
    cuts = np.zeros(costs.shape, dtype=np.int64)
    for length in range(1, units + 1):
        before = np.arange(1, length)
        for first in (0, 1):
            fits = np.array(graphs) + first * spare >= length
            costs[first, :-1, length][fits] = 0.0
            rows = np.flatnonzero(~fits)
            if length > 1 and len(rows):
                totals = (
                    before + costs[0][rows][:, before] + costs[first][rows + 1][:, length - before]
                )
                best = totals.argmin(1)
                costs[first, rows, length] = totals.min(1)
                cuts[first, rows, length] = before[best]
    return cuts, float(costs[1, 0, units]) if deepest else math.inf
