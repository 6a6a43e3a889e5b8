"""Words that the article has already used against words that are new to it.

A cache can only help with words seen before; weights may also help with new ones (subject, style).
The distance since a word's last use tells for how long a method remembers.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from metalm.analysis.statistics.bootstrap import Interval, ratio_intervals
from metalm.analysis.statistics.positions import short
from metalm.analysis.statistics.scores import END_OF_LINE, UNKNOWN, Scores, exponential

DISTANCES = (32, 128, 512, 2048)
NEW, SEEN, NEITHER = "new", "seen before", "end of line or <unk>"
GROUPS = (NEW, SEEN, NEITHER)


@dataclass(frozen=True, kw_only=True)
class ByGroup:
    """Figures of groups of words that share out the split."""

    groups: tuple[str, ...]
    """Names of the groups."""
    num_words: tuple[int, ...]
    """Words in each group [groups]."""
    perplexity: dict[str, tuple[float | None, ...]]
    """Method -> perplexity per word [groups]; None for an empty group."""
    gain: dict[str, tuple[Interval | None, ...]]
    """Adaptive method -> nats per word saved against its baseline [groups]."""


def last_use(words: list[str]) -> NDArray[np.int64]:
    """Words since the same word was last used in the article [num_words]; 0 if it is new.

    Example:
        >>> last_use(["a", "b", "a", "a"]).tolist()
        [0, 0, 2, 1]
    """
    latest: dict[str, int] = {}
    distances = np.zeros(len(words), np.int64)
    for position, word in enumerate(words):
        distances[position] = position - latest.get(word, position)
        latest[word] = position
    return distances


def by_seen(scores: Scores) -> ByGroup:
    """Perplexity and gain of words that are new to the article, were seen before, or neither.

    Ends of lines and "<unk>" are neither: they stand for no particular word.
    """
    groups = [
        np.where(_nameless(article.words), 2, (last_use(article.words) > 0).astype(np.int64))
        for article in scores.articles
    ]
    return _by_group(scores, groups, GROUPS)


def by_last_use(scores: Scores) -> ByGroup:
    """Perplexity and gain of words seen before, by how many words ago they were last used."""
    groups = []
    for article in scores.articles:
        distances = last_use(article.words)
        group = np.searchsorted(DISTANCES, distances, side="right")
        groups.append(np.where((distances == 0) | _nameless(article.words), -1, group))
    between = (f"{short(low)}–{short(high)}" for low, high in pairwise(DISTANCES))
    names = (f"< {short(DISTANCES[0])}", *between, f"≥ {short(DISTANCES[-1])}")
    return _by_group(scores, groups, names)


def _nameless(words: list[str]) -> NDArray[np.bool_]:
    return np.array([word in (END_OF_LINE, UNKNOWN) for word in words])


def _by_group(scores: Scores, groups: list[NDArray[np.int64]], names: tuple[str, ...]) -> ByGroup:
    """Figures of each group; `groups` gives each word's group by number, -1 for none."""

    def sums(method: str | None) -> NDArray[np.float64]:
        columns = []
        for article, group in zip(scores.articles, groups, strict=True):
            weights = None if method is None else article.losses[method][group >= 0]
            columns.append(np.bincount(group[group >= 0], weights, minlength=len(names)))
        return np.stack(columns, axis=1).astype(np.float64)

    words = sums(None)
    nats = {method: sums(method) for method in scores.methods}
    total = words.sum(axis=1)
    return ByGroup(
        groups=names,
        num_words=tuple(int(n) for n in total),
        perplexity={
            method: tuple(
                exponential(nat / num) if num else None
                for nat, num in zip(nats[method].sum(axis=1), total, strict=True)
            )
            for method in scores.methods
        },
        gain={
            method: tuple(
                interval if num else None
                for interval, num in zip(
                    ratio_intervals(nats[scores.baselines[method]] - nats[method], words),
                    total,
                    strict=True,
                )
            )
            for method in scores.adaptive
        },
    )
