"""Perplexity and gain by the position of a word in its article.

Articles differ in length, so the population changes from bin to bin. Two answers are given beside
the plain perplexities: the gain, which compares methods on identical words, and a cohort of long
articles that are all present in every bin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from metalm.analysis.statistics.bootstrap import (
    Interval,
    interval_from_resamples,
    ratio_intervals,
    resampled_ratios,
)
from metalm.analysis.statistics.scores import FloatArray, IntArray, Scores, exponential

FIRST_EDGE = 128
LAST_EDGE = 8192
COHORT_LENGTH = 2048
COHORT_ARTICLES = 10


@dataclass(frozen=True, kw_only=True)
class ByPosition:
    """Figures by bins of word position; bin b holds positions edges[b] <= position < edges[b+1]."""

    edges: tuple[int, ...]
    """Bin edges in words from the start of the article [bins + 1]."""
    num_articles: tuple[int, ...]
    """Articles that have at least one word in the bin [bins]."""
    num_words: tuple[int, ...]
    """Words in the bin [bins]."""
    perplexity: dict[str, tuple[float, ...]]
    """Method -> perplexity per word [bins]."""
    gain: dict[str, tuple[Interval, ...]]
    """Method -> nats per word saved against what it is compared with [bins]."""
    growth: dict[str, Interval | None]
    """Method -> gain in the last bin minus gain in the first; None with a single bin."""
    against: dict[str, str]
    """Method -> the method that its gain is measured against."""
    cohort_length: int | None
    """Only articles of at least this many words, read up to here; None: all words of all."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Readable bin names such as "512-1K" [bins]."""
        return tuple(
            f"{short(low)}+" if low == LAST_EDGE else f"{short(low)}–{short(high)}"
            for low, high in pairwise(self.edges)
        )


def bin_edges(longest: int) -> tuple[int, ...]:
    """Edges 0, 128, 256, ... up to the first that is no less than the longest article.

    Beyond 8192 words there is one last bin, which ends with the longest article.
    """
    edges = [0, FIRST_EDGE]
    while edges[-1] < longest:
        edges.append(2 * edges[-1] if edges[-1] < LAST_EDGE else longest)
    return tuple(edges)


def choose_cohort_length(num_words: Sequence[int] | IntArray) -> int | None:
    """Length of the cohort of long articles: 2048 words if enough articles are that long.

    The longest of 2048, 1024, ... 256 words that at least ten articles reach, or half of the
    articles where there are fewer than twenty; None if no such length exists.
    """
    lengths = np.asarray(num_words)
    enough = max(2, min(COHORT_ARTICLES, len(lengths) // 2))
    length = COHORT_LENGTH
    while length > FIRST_EDGE:
        if (lengths >= length).sum() >= enough:
            return length
        length //= 2
    return None


def by_position(
    scores: Scores, *, cohort_length: int | None = None, against: Mapping[str, str] | None = None
) -> ByPosition:
    """Perplexity and gain in bins of word position that double in width.

    Args:
        scores: the scores of a split.
        cohort_length: if given, only articles of at least this many words, and only their first
            `cohort_length` words, so that every bin holds the same articles.
        against: method -> the method that its gain is measured against (default: every adaptive
            method against its own baseline).

    Raises:
        ValueError: if no article is long enough.
    """
    chosen = scores.articles
    if cohort_length is not None:
        chosen = tuple(a for a in chosen if a.num_words >= cohort_length)
        if not chosen:
            raise ValueError(
                f"no article is long enough for the cohort; expected at least {cohort_length} "
                f"words, found at most {scores.num_words.max()}; choose a shorter cohort_length"
            )
    last = max(a.num_words for a in chosen) if cohort_length is None else cohort_length
    edges = bin_edges(last)
    positions = [np.arange(min(a.num_words, last)) for a in chosen]
    words = np.stack([_bin_sums(np.ones(len(p)), edges) for p in positions], axis=1)
    nats = {
        method: np.stack([_bin_sums(a.losses[method][:last], edges) for a in chosen], axis=1)
        for method in scores.methods
    }
    pairs = {m: scores.baselines[m] for m in scores.adaptive} if against is None else dict(against)
    saved = {method: nats[other] - nats[method] for method, other in pairs.items()}
    return ByPosition(
        edges=edges,
        num_articles=tuple(int(n) for n in (words > 0).sum(axis=1)),
        num_words=tuple(int(n) for n in words.sum(axis=1)),
        perplexity={
            method: tuple(exponential(n) for n in sums.sum(axis=1) / words.sum(axis=1))
            for method, sums in nats.items()
        },
        gain={method: tuple(ratio_intervals(sums, words)) for method, sums in saved.items()},
        growth={method: _growth(sums, words) for method, sums in saved.items()},
        against=pairs,
        cohort_length=cohort_length,
    )


def _growth(saved: FloatArray, words: FloatArray) -> Interval | None:
    """Gain in the last bin minus that in the first, resampled together; sums [bins, articles]."""
    if len(words) < 2:
        return None
    ends = [0, -1]
    first, last = saved[ends].sum(axis=1) / words[ends].sum(axis=1)
    resamples = resampled_ratios(saved[ends], words[ends])
    speaking = int((words[-1] > 0).sum())
    return interval_from_resamples(float(last - first), resamples[:, 1] - resamples[:, 0], speaking)


def _bin_sums(values: FloatArray, edges: tuple[int, ...]) -> FloatArray:
    """Sums of an article's values in each bin [bins]; zero beyond its end."""
    totals = np.concatenate([[0.0], np.cumsum(values)])
    at_edges = totals[np.minimum(edges, len(values))]
    return np.diff(at_edges)


def short(number: int) -> str:
    """A position in words, with K for 1024 from there on."""
    return str(number) if number < 1024 else f"{number // 1024}K"
