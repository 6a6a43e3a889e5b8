"""What reading costs: every method by itself, with nothing beside it that it does not need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.text.articles import ArticleSet
from metalm.language.tuning.tuning_text import Mode
from metalm.training.memory import peak_memory, reset_peak_memory

COST_TOKENS = 600
"""Tokens that are read to measure, of all texts together."""
_SEGMENTS = 3
"""Segments of each text at least, where it is so long; the first begins with W_0."""
_ROUNDS = 3


def reading_costs(
    models: TrainedModels,
    methods: Sequence[Method],
    articles: ArticleSet,
    mode: Mode,
    rows: int,
    tokens: int = COST_TOKENS,
    *,
    bfloat16: bool = False,
) -> dict[str, dict[str, float]]:
    """Speed and memory of each method on the beginnings of articles.

    Copies are read one after the other, and the last one carries the cache; only a learned mixture
    has model and cache write down how sure they are. Nothing is recorded.

    Args:
        models: the trained weights.
        methods: what is measured.
        articles: the first `rows` of them are read (the first alone in the mode `carry`).
        mode: "reset" reads `rows` articles at once, "carry" one text.
        rows: see there.
        tokens: read in all, several times (the median counts); more where many rows are to have
            some segments each.
        bfloat16: whether matrix products are in bfloat16 (`Reader`).

    Returns:
        Method -> "tokens_per_second" and, where the system tells, "peak_memory_bytes" (of the whole
        process).
    """
    count = min(rows, len(articles)) if mode == "reset" else 1
    longest = max((method.segment for method in methods if method.learning != "none"), default=1)
    length = max(_SEGMENTS * longest, tokens // count)
    texts = [articles[number].tokens[:length] for number in range(count)]
    known: dict[object, Mapping[str, float]] = {}
    found = {}
    for method in methods:
        copies = method.copies()
        caches = [None] * (len(copies) - 1) + [method.cache]
        parts = []
        for copy, cache in zip(copies, caches, strict=True):
            key = (*_key(copy), cache, method.learned_mixture)
            if key not in known:
                grid = None
                if cache is not None:
                    grid = CacheGrid(thetas=(cache.theta,), window=cache.window)
                known[key] = _measure(
                    models, copy, texts, grid, sure=method.learned_mixture, bfloat16=bfloat16
                )
            parts.append(known[key])
        found[method.name] = _together(parts)
    return found


def _key(copy: Method) -> tuple[object, ...]:
    return copy.model, copy.learning, copy.segment, tuple(sorted(copy.settings.items()))


def _measure(
    models: TrainedModels,
    copy: Method,
    texts: Sequence[NDArray[np.int32]],
    grid: CacheGrid | None,
    *,
    sure: bool,
    bfloat16: bool,
) -> dict[str, float]:
    reader = Reader(
        models.model(copy),
        models.rule(copy),
        models.fast_names(copy),
        copy.segment,
        grid,
        confidence=sure,
        surprise=copy.surprise,
        bfloat16=bfloat16,
    )
    reader.read(texts, len(texts))  # warms up
    reset_peak_memory()
    readings = [reader.read(texts, len(texts)) for _ in range(_ROUNDS)]
    peak = peak_memory()
    cost = {"tokens_per_second": median(each.num_tokens / each.seconds for each in readings)}
    return cost if peak is None else cost | {"peak_memory_bytes": float(peak)}


def _together(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of copies that are read one after the other."""
    cost = {"tokens_per_second": 1 / sum(1 / part["tokens_per_second"] for part in parts)}
    if all("peak_memory_bytes" in part for part in parts):
        cost["peak_memory_bytes"] = max(part["peak_memory_bytes"] for part in parts)
    return cost
