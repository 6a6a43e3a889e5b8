"""Texts dealt out to several processes, and what they have read put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from metalm.language.reading.reader import Readings

Value = TypeVar("Value")


def deal(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Places of texts for each process, so that all read about as many tokens.

    The longest texts first, each to the process that has least to read; within a process they stay
    in their order.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = loads.index(min(loads))
        dealt[least].append(place)
        loads[least] += lengths[place]
    return [sorted(places) for places in dealt]


def gathered(parts: Sequence[Readings], dealt: Sequence[Sequence[int]]) -> Readings:
    """The readings of all texts, in their order, from those of each process.

    Args:
        parts: of each process; the time is the longest of them.
        dealt: which texts each has read.
    """
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([np.asarray(places, dtype=int) for places in dealt]))

    def all_of(lists: Iterable[Sequence[Value]]) -> list[Value]:
        found = [value for values in lists for value in values]
        return [found[place] for place in order] if found else []

    some = next((part.curves for part in parts if part.nats), [])
    return Readings(
        nats=all_of(part.nats for part in parts),
        cache=all_of(part.cache for part in parts),
        confidence=all_of(part.confidence for part in parts),
        tempered=all_of(part.tempered for part in parts),
        fallbacks=all_of(part.fallbacks for part in parts),
        seconds=max(part.seconds for part in parts),
        curves=[
            curve._replace(
                places=all_of(part.curves[number].places for part in parts if part.nats),
                values=all_of(part.curves[number].values for part in parts if part.nats),
            )
            for number, curve in enumerate(some)
        ],
    )
