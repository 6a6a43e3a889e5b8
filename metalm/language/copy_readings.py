"""Readings of several fast copies, and of rivals: one after the other, or side by side.

A single long text (the carry-on mode) leaves a batch one row. Where several ways to learn read it
from the same model with segments of the same length and the same surprise, each gets a row of its
own: their recurrent products are then shared, as those of several articles are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metalm.language.methods import Method, TrainedModels
from metalm.language.reading import CacheGrid, Reader, Readings
from metalm.language.reading_curves import CurveRecorder
from metalm.meta.rules.side_by_side import SideBySide
from metalm.meta.step_rule import AbstractStepRule

Texts = Sequence[NDArray[np.int32]]
Begin = Callable[[str, int], Callable[[int, float], None]]
"""Told who begins to read how many tokens; what it gives is told tokens and nats as they come."""


class Request(NamedTuple):
    """A method of one copy, and the cache probabilities that are wanted beside it."""

    method: Method
    grid: CacheGrid | None


def read_copies(
    models: TrainedModels,
    requests: Sequence[Request],
    texts: Texts,
    rows: int,
    *,
    confidence: bool = False,
    curves: bool = False,
    progress: Begin | None = None,
) -> Iterator[tuple[list[int], list[Readings]]]:
    """Reads the texts with every method; the scores do not depend on what is read together.

    Args:
        models: the trained weights.
        requests: methods without several copies.
        texts: token ids of each.
        rows: rows of a batch: texts of one method, or, of a single text, methods side by side.
        confidence: whether to write down how sure model and cache were.
        curves: whether to record what happens to the fast weights.
        progress: told of every batch as it begins.

    Yields:
        Places of the requests that were read together, and the readings of each.
    """
    for places in _together(models, requests, rows if len(texts) == 1 else 1):
        methods = [requests[place].method for place in places]
        one, grid = methods[0], requests[places[0]].grid
        rule = models.rule(one) if len(places) == 1 else _side_by_side(models, methods)
        names = models.fast_names(one)
        reader = Reader(
            models.model(one),
            rule,
            names,
            one.segment,
            grid,
            confidence=confidence,
            surprise=one.surprise,
        )
        repeated = [text for text in texts for _ in places]  # several places: a single text
        recorder = None
        if curves and rule is not None:
            recorder = CurveRecorder(reader.slow, rule, len(repeated))
        tell = None
        if progress is not None:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            tell = progress(one.name + more, sum(len(text) for text in repeated))
        readings = reader.read(repeated, rows, tell, recorder)
        yield places, [readings] if len(places) == 1 else _apart(readings)


def _together(models: TrainedModels, requests: Sequence[Request], most: int) -> Iterator[list[int]]:
    """Places of the requests that are read in one batch, in the order of their first."""
    groups: dict[object, list[int]] = {}
    for place, (method, grid) in enumerate(requests):
        rule = models.rule(method)
        alone = most == 1 or not isinstance(rule, AbstractStepRule)
        shared = (method.model, method.segment, method.surprise, models.fast_names(method), grid)
        groups.setdefault(place if alone else shared, []).append(place)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


@torch.no_grad()
def _side_by_side(models: TrainedModels, methods: Sequence[Method]) -> SideBySide:
    sizes = []
    for method in methods:
        rule = models.rule(method)
        assert isinstance(rule, AbstractStepRule)
        # New tensors: the next method may set other scales of the same rule.
        sizes.append(rule.coefficients())
    return SideBySide(sizes)


def _apart(readings: Readings) -> list[Readings]:
    """What each row read, as if it had been alone; the time is that of all."""
    return [
        Readings(
            readings.nats[row : row + 1],
            readings.cache[row : row + 1],
            readings.confidence[row : row + 1],
            readings.fallbacks[row : row + 1],
            readings.seconds / len(readings.nats),
            [
                curve._replace(
                    places=curve.places[row : row + 1], values=curve.values[row : row + 1]
                )
                for curve in readings.curves
            ],
        )
        for row in range(len(readings.nats))
    ]
