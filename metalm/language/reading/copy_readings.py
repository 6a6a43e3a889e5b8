"""Readings of several fast copies, and of rivals: one after the other, or side by side.

A single long text (the carry-on mode) leaves a batch one row. Where several ways to learn read it
from the same model with segments of the same length and the same surprise, each gets a row of its
own: their recurrent products are then shared, as those of several articles are.

Several processes share the texts; of a single text, the ways to learn. Each ends up with all
readings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metalm.language.reading.curves import CurveRecorder
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Reader, Readings
from metalm.language.reading.shared_texts import deal, gathered
from metalm.language.reading.unfinished import Unfinished
from metalm.meta.rules.side_by_side import SideBySide
from metalm.meta.step_rule import AbstractStepRule
from metalm.meta.update_rule import AbstractUpdateRule
from metalm.training import processes

Texts = Sequence[NDArray[np.int32]]
Begin = Callable[[str, int], Callable[[int, float], None]]
"""Told who begins to read how many tokens; what it gives is told tokens and nats as they come."""

Keep = Callable[[Sequence[int]], Unfinished]
"""Where the reading of the requests of these places is kept while it goes on."""


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
    temperatures: Sequence[float] = (),
    curves: bool = False,
    bfloat16: bool = False,
    progress: Begin | None = None,
    unfinished: Keep | None = None,
) -> Iterator[tuple[list[int], list[Readings]]]:
    """Reads the texts with every method; the scores do not depend on what is read together.

    Args:
        models: the trained weights.
        requests: methods without several copies.
        texts: token ids of each.
        rows: rows of a batch in each process: texts of one method, or, of a single text, methods
            side by side.
        confidence: whether to write down how sure model and cache were.
        temperatures: under which the tokens are scored too.
        curves: whether to record what happens to the fast weights.
        bfloat16: whether matrix products are in bfloat16 (`Reader`).
        progress: told of every batch as it begins.
        unfinished: where the readings of the requests of these places are kept meanwhile.

    Yields:
        Places of the requests that were read together, and the readings of each.
    """
    how = _How(rows, confidence, tuple(temperatures), curves, bfloat16, progress, unfinished)
    if len(texts) == 1:
        yield from _methods_shared(models, requests, texts, how)
    else:
        yield from _texts_shared(models, requests, texts, how)


def _methods_shared(
    models: TrainedModels, requests: Sequence[Request], texts: Texts, how: _How
) -> Iterator[tuple[list[int], list[Readings]]]:
    """A single text: in each turn one batch of methods for every process."""
    count, own = processes.count(), processes.rank()
    most = max(1, min(how.rows, -(-len(requests) // count)))  # so that no process goes without
    groups = list(_together(models, requests, most))
    for start in range(0, len(groups), count):
        turn = groups[start : start + count]
        mine = turn[own] if own < len(turn) else []
        several = processes.of_each(how.read(models, requests, mine, texts) if mine else None)
        for places, readings in zip(turn, several, strict=False):
            assert readings is not None
            yield places, [readings] if len(places) == 1 else _apart(readings)


def _texts_shared(
    models: TrainedModels, requests: Sequence[Request], texts: Texts, how: _How
) -> Iterator[tuple[list[int], list[Readings]]]:
    """Several texts: one method after the other, some of the texts for every process."""
    dealt = deal([len(text) for text in texts], processes.count())
    mine = [texts[place] for place in dealt[processes.rank()]]
    for place in range(len(requests)):
        readings = how.read(models, requests, [place], mine) if mine else Readings([])
        yield [place], [gathered(processes.of_each(readings), dealt)]


class _How(NamedTuple):
    """What all readings have in common; see `read_copies`."""

    rows: int
    confidence: bool
    temperatures: Sequence[float]
    curves: bool
    bfloat16: bool
    progress: Begin | None
    unfinished: Keep | None

    def read(
        self,
        models: TrainedModels,
        requests: Sequence[Request],
        places: Sequence[int],
        texts: Texts,
    ) -> Readings:
        """Reads texts with the method of one place, or a single text with those of several."""
        methods = [requests[place].method for place in places]
        one, grid = requests[places[0]]
        rule = models.rule(one) if len(methods) == 1 else _side_by_side(models, methods)
        reader = Reader(
            models.model(one),
            rule,
            models.fast_names(one),
            one.segment,
            grid,
            confidence=self.confidence,
            temperatures=self.temperatures,
            surprise=one.surprise,
            bfloat16=self.bfloat16,
        )
        repeated = [text for text in texts for _ in methods]
        recorder = None
        if self.curves and rule is not None:
            recorder = CurveRecorder(reader.slow, rule, len(repeated))
        tell = None
        if self.progress is not None:
            more = f" and {len(methods) - 1} more" if len(methods) > 1 else ""
            tell = self.progress(one.name + more, sum(len(text) for text in repeated))
        kept = None if self.unfinished is None else self.unfinished(places)
        return reader.read(repeated, self.rows, tell, recorder, kept)


def _together(models: TrainedModels, requests: Sequence[Request], most: int) -> Iterator[list[int]]:
    """Places of the requests that are read in one batch, in the order of their first."""
    groups: dict[object, list[int]] = {}
    for place, (method, grid) in enumerate(requests):
        flushes, rule = _flushes_and_rule(models.rule(method))
        alone = most == 1 or not isinstance(rule, AbstractStepRule)
        names = models.fast_names(method)
        model = id(models.model(method))
        shared = (model, method.segment, method.surprise, names, flushes, grid)
        groups.setdefault(place if alone else shared, []).append(place)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


@torch.no_grad()
def _side_by_side(models: TrainedModels, methods: Sequence[Method]) -> AbstractUpdateRule:
    """One rule for methods that all flush or none of which does."""
    sizes, flushes = [], False
    for method in methods:
        flushes, rule = _flushes_and_rule(models.rule(method))
        assert isinstance(rule, AbstractStepRule)
        # New tensors: the next method may set other scales of the same rule.
        sizes.append(rule.coefficients())
    together = SideBySide(sizes)
    if not flushes:
        return together
    assert models.starts is not None
    return Flushing(together, models.starts)


def _flushes_and_rule(rule: AbstractUpdateRule | None) -> tuple[bool, AbstractUpdateRule | None]:
    """Whether a rule flushes, and what it does between two flushes."""
    return (True, rule.inner) if isinstance(rule, Flushing) else (False, rule)


def _apart(readings: Readings) -> list[Readings]:
    """What each row read, as if it had been alone; the time is that of all."""
    return [
        Readings(
            nats=readings.nats[row : row + 1],
            cache=readings.cache[row : row + 1],
            confidence=readings.confidence[row : row + 1],
            tempered=readings.tempered[row : row + 1],
            fallbacks=readings.fallbacks[row : row + 1],
            seconds=readings.seconds / len(readings.nats),
            curves=[
                curve._replace(
                    places=curve.places[row : row + 1], values=curve.values[row : row + 1]
                )
                for curve in readings.curves
            ],
        )
        for row in range(len(readings.nats))
    ]
