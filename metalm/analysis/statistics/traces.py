"""What was recorded of a method while it read, besides losses: distances of weights, gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from metalm.analysis.statistics.scores import FloatArray


class Quantity(NamedTuple):
    """What is recorded, and how the page speaks of it."""

    key: str
    """Names it in files."""
    label: str
    """Of the axis, with the unit."""
    title: str
    """Heading of the figure."""
    text: str
    """What the figure shows."""


DISTANCE = Quantity(
    "distance",
    "‖W − W0‖ / ‖W0‖",
    "How far the fast weights are from the slow ones",
    "Distance of each tensor's fast weights from W0, over the size of W0, along the articles A, B, "
    "C ... of the curve of the gain: where it falls to zero the memory was emptied.",
)
UPDATE = Quantity(
    "update",
    "mean update gate",
    "Gates of the update rule: update",
    "How much of the learned rate is used, from 0 to 2, as a mean over the coordinates of a "
    "tensor; along the same articles.",
)
FLUSH = Quantity(
    "flush",
    "mean flush gate",
    "Gates of the update rule: flush",
    "Share of the way back to W0 at each update, as a mean over the coordinates of a tensor, and 1 "
    "where all went back because an article seemed to begin; along the same articles.",
)
QUANTITIES = {quantity.key: quantity for quantity in (DISTANCE, UPDATE, FLUSH)}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One curve along each article, at some of its words.

    Raises:
        ValueError: if an article has not as many values as places.
    """

    method: str
    """Name of the method that read."""
    quantity: Quantity
    """What it is."""
    name: str
    """Which tensor."""
    words: Sequence[FloatArray]
    """For each article, how many of its words had been read [values]."""
    values: Sequence[FloatArray]
    """For each article, the values there [values]."""

    def __post_init__(self) -> None:
        """Check that places and values belong together."""
        places, values = [len(w) for w in self.words], [len(v) for v in self.values]
        if places != values:
            raise ValueError(
                f"the trace {self.name!r} of {self.method!r} does not fit; expected a value a "
                f"place in every article, found {values} values for {places} places; record both "
                "together"
            )
