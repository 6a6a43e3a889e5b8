"""The figures of a whole split: one row a method, and every one of ours against every rival."""

from dataclasses import dataclass

from metalm.analysis.statistics.bootstrap import Interval, gain, perplexity_ratio
from metalm.analysis.statistics.scores import Scores

MEANS = {
    "cache": {"cache"},
    "learned cache": {"learned cache", "cache"},
    "two rates": {"two rates"},
    "learned mixture + cache": {"learned cache"},
    "learned mixture": {"learned mixture", "two rates"},
}
"""What a method may have beside the others, by the words in its name that say so."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method's figures over a split."""

    method: str
    """Name of the method."""
    perplexity: float
    """Perplexity per word."""
    perplexity_without_unknown: float | None
    """Perplexity per word over the words that are not "<unk>"."""
    article_weighted_perplexity: float
    """Geometric mean over articles of their perplexities per word."""
    baseline: str
    """The method without adaptation that the gain is measured against."""
    gain: Interval | None
    """Nats per word saved against the baseline; None for a baseline itself."""
    ratio_to_best_rival: Interval
    """Perplexity over that of the best rival, on the same words."""


def best_rival(scores: Scores) -> str:
    """The method of lowest perplexity that is not ours (of all methods if there is no rival)."""
    return min(scores.rivals or scores.methods, key=scores.perplexity)


def matched_rival(scores: Scores, method: str) -> str:
    """The best rival that has no means (`MEANS`) which the method lacks; else the best of all."""
    rivals = scores.rivals or scores.methods
    matched = [rival for rival in rivals if _means(rival) <= _means(method)]
    return min(matched or rivals, key=scores.perplexity)


def _means(method: str) -> set[str]:
    return {means for words, found in MEANS.items() if words in method for means in found}


def summarise(scores: Scores) -> list[Row]:
    """One row for each method, in the order of the methods."""
    rival = best_rival(scores)
    return [
        Row(
            method=method,
            perplexity=scores.perplexity(method),
            perplexity_without_unknown=scores.perplexity_without_unknown(method),
            article_weighted_perplexity=scores.article_weighted_perplexity(method),
            baseline=scores.baselines[method],
            gain=gain(scores, method) if scores.baselines[method] != method else None,
            ratio_to_best_rival=perplexity_ratio(scores, method, rival),
        )
        for method in scores.methods
    ]


def compare_with_rivals(scores: Scores) -> dict[str, dict[str, Interval]]:
    """Perplexity of each of ours that adapts over that of each rival: ours -> rival -> ratio."""
    return {
        method: {rival: perplexity_ratio(scores, method, rival) for rival in scores.rivals}
        for method in scores.ours
        if method in scores.adaptive
    }
