"""Windows of varying length, in which AWD-LSTM reads its text (Merity et al. 2018, section 4).

Were all windows equally long, the same tokens would be cut off from their past in every pass. So

    m = window with probability 1 - p, else window / 2;    length = max(shortest, int(N(m, spread)))

and the windows of a pass follow from the seed and the number of the pass alone.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import numpy as np


class WindowLengths(NamedTuple):
    """The distribution of lengths, in tokens of a row."""

    mean: float
    """Mean length of most windows."""
    short_share: float
    """Probability p that a window has half that mean."""
    spread: float
    """Standard deviation."""
    shortest: int
    """Lowest length."""

    def draw(self, random: np.random.Generator) -> int:
        """The length of one window."""
        mean = self.mean if random.random() >= self.short_share else self.mean / 2
        return max(self.shortest, int(random.normal(mean, self.spread)))


class Window(NamedTuple):
    """What one step reads."""

    epoch: int
    """The pass, from 0."""
    start: int
    """Place in the rows."""
    length: int
    """Tokens drawn; the last window of a pass may have fewer left to read."""
    done: float
    """Passes finished before this step, in windows: the middle of three of pass 2 has 2 + 1/3."""
    is_last: bool
    """Whether the pass ends with it."""


class WindowPlan:
    """All windows of a training; which one a step reads follows from its number.

    What would be left for a window of a single token is not read in that pass, as published.

    Args:
        lengths: of the windows.
        row_length: tokens of each row in one pass, at least 2.
        epochs: passes.
        seed: of the draws.
    """

    def __init__(self, lengths: WindowLengths, row_length: int, epochs: int, seed: int) -> None:
        self._lengths, self._row_length, self._seed = lengths, row_length, seed
        self._ends = list(accumulate(len(self._drawn(epoch)) for epoch in range(epochs)))
        self._known: tuple[int, list[int]] = (-1, [])

    @property
    def num_steps(self) -> int:
        """Windows of all passes."""
        return self._ends[-1]

    def at(self, index: int) -> Window:
        """The window of step `index`, from 0."""
        epoch = bisect_right(self._ends, index)
        if self._known[0] != epoch:
            self._known = epoch, self._drawn(epoch)
        lengths = self._known[1]
        number = index - (self._ends[epoch - 1] if epoch else 0)
        return Window(
            epoch=epoch,
            start=sum(lengths[:number]),
            length=lengths[number],
            done=epoch + number / len(lengths),
            is_last=number == len(lengths) - 1,
        )

    def _drawn(self, epoch: int) -> list[int]:
        random = np.random.default_rng([self._seed, epoch])
        drawn, start = [], 0
        while start < self._row_length - 1:
            drawn.append(self._lengths.draw(random))
            start += drawn[-1]
        return drawn
