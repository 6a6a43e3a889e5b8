"""Readings of a text by whole methods: copies and caches that several of them need, read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.copy_readings import Begin, Request, Texts, read_copies
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Readings


class MethodReadings(NamedTuple):
    """What `nats_of_copies` makes the losses of a method from."""

    copies: list[Readings]
    """Of each fast copy."""
    theta: int | None
    """Place of the cache's theta among those that were read with; None for no cache."""
    share: float
    """Of the cache."""


def read_methods(
    models: TrainedModels,
    methods: Sequence[Method],
    texts: Texts,
    rows: int,
    *,
    confidence: bool = False,
    temperatures: Sequence[float] = (),
    progress: Begin | None = None,
) -> list[MethodReadings]:
    """Reads the texts with every method; see `read_copies` for what is wanted."""
    grid = _grid([method.cache for method in methods if method.cache is not None])
    copies = {repr(described(copy)): copy for method in methods for copy in method.copies()}
    requests = [Request(copy, grid) for copy in copies.values()]
    read: dict[str, Readings] = {}
    for places, several in read_copies(
        models,
        requests,
        texts,
        rows,
        confidence=confidence,
        temperatures=temperatures,
        progress=progress,
    ):
        read.update(zip((list(copies)[place] for place in places), several, strict=True))
    found = []
    for method in methods:
        theta, share = None, 0.0
        if method.cache is not None and grid is not None:
            theta, share = grid.thetas.index(method.cache.theta), method.cache.share
        own = [read[repr(described(copy))] for copy in method.copies()]
        found.append(MethodReadings(own, theta, share))
    return found


def described(method: Method) -> dict[str, Any]:
    """Everything that the losses of a method depend on, but for weights and text; JSON values."""
    cache = method.cache
    return {
        "model": method.model,
        "learning": method.learning,
        "segment": method.segment,
        "settings": dict(sorted(method.settings.items())),
        "multiples": list(method.multiples),
        "cache": None if cache is None else [cache.theta, cache.share, cache.window],
    }


def _grid(caches: Sequence[CacheConfig]) -> CacheGrid | None:
    """The caches of all methods, so that one reading serves them."""
    if not caches:
        return None
    thetas = tuple(sorted({cache.theta for cache in caches}))
    return CacheGrid(thetas=thetas, window=max(cache.window for cache in caches))
