"""Choosing the settings of every method on validation articles, with the same care for each.

The search walks: it multiplies or divides one setting at a time by a factor, goes on while the
perplexity falls, and ends with a round of half steps. Every trial is also mixed with the cache over
a grid of theta and lambda, so that a method with a cache has settings of its own. All trials are
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metalm.language.articles import ArticleSet
from metalm.language.cache import CacheConfig
from metalm.language.copies import nats_of_copies
from metalm.language.copy_readings import Request, read_copies
from metalm.language.methods import (
    ALL_BUT_RECURRENT,
    RATES,
    STARTS,
    STEPS,
    Learning,
    Method,
    ModelName,
    TrainedModels,
)
from metalm.language.reading import CacheGrid, Readings

# What shrinks with the segment: shorter segments update more often.
SHRINKING = ("rate", "decay", "rate_scale", "decay_scale")

# A step must lower the perplexity by two in ten thousand: far less than the text's own noise.
_ENOUGH = 1 - 2e-4

Settings = Mapping[str, float]
Mode = str


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The text and the grids of the search."""

    articles: int = 8
    """Validation articles, spread evenly over the split."""
    tokens: int = 2000
    """Tokens read of each, from its start."""
    carry_tokens: int = 0
    """Tokens read of each in the carry-on mode, where rows cannot share the work; 0: as many."""
    adapt: tuple[str, ...] = ALL_BUT_RECURRENT
    """Patterns of the parameters that dynamic evaluation adapts."""
    segments: tuple[int, ...] = (20, 10, 5)
    """Segment lengths tried for dynamic evaluation."""
    rule_segments: tuple[int, ...] = (20, 10)
    """Segment lengths tried for the learned rules (they are trained at one of them)."""
    halvings: int = 1
    """How often the steps of the search are halved."""
    thetas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.66, 1.0)
    """Flatnesses of the cache."""
    shares: tuple[float, ...] = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.28)
    """Shares lambda of the cache."""
    window: int = 3785
    """Window of the cache (as AWD-LSTM on WikiText-2)."""
    rows: int = 8
    """Articles read at once in the reset mode."""
    spreads: tuple[float, ...] = ()
    """Two fast copies are tried with the best rate times and over each of these numbers."""


@dataclass(frozen=True, kw_only=True)
class TuningText:
    """The token arrays that are read, and how many words they stand for."""

    texts: Sequence[NDArray[np.int32]]
    """One per article (reset), or one in all (carry)."""
    num_words: int
    """Words and ends of line in the texts."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One reading of the tuning text."""

    segment: int
    """Tokens between two updates."""
    settings: Settings
    """Of the update rule."""
    perplexity: float
    """Per word, without a cache."""
    cached_perplexity: float
    """Per word, with the best cache of the grid."""
    cache: CacheConfig
    """That cache."""
    seconds: float
    """How long the reading took."""
    multiples: tuple[float, ...] = (1.0,)
    """What multiplies the rate in each fast copy (see `Method`)."""


def tuning_articles(articles: ArticleSet, config: TuningConfig) -> list[int]:
    """Places of the validation articles that are read, spread evenly over the split."""
    count = min(config.articles, len(articles))
    chosen: list[int] = np.linspace(0, len(articles) - 1, count).round().astype(int).tolist()
    return sorted(set(chosen))


def tuning_text(articles: ArticleSet, config: TuningConfig, mode: Mode) -> TuningText:
    """The first tokens of some validation articles; laid end to end when the mode is `carry`."""
    tokens = (config.carry_tokens or config.tokens) if mode == "carry" else config.tokens
    texts, words = [], 0
    for index in tuning_articles(articles, config):
        article = articles[index]
        texts.append(article.tokens[:tokens])
        words += int(article.words[len(texts[-1]) - 1]) + 1
    if mode == "carry":
        texts = [np.concatenate(texts)]
    return TuningText(texts=texts, num_words=words)


def try_methods(
    models: TrainedModels, methods: Sequence[Method], text: TuningText, config: TuningConfig
) -> list[Trial]:
    """Reads the tuning text with each method, and mixes the results with every cache of the grid.

    Of a single text, methods and copies that fit together are read side by side.
    """
    grid = CacheGrid(thetas=config.thetas, window=config.window)
    requests = [Request(copy, grid) for method in methods for copy in method.copies()]
    read: dict[int, Readings] = {}
    for places, several in read_copies(models, requests, text.texts, config.rows):
        read.update(zip(places, several, strict=True))
    in_order = (read[place] for place in range(len(requests)))
    return [
        _trial(method, [next(in_order) for _ in method.copies()], text, config)
        for method in methods
    ]


def _trial(
    method: Method, copies: Sequence[Readings], text: TuningText, config: TuningConfig
) -> Trial:
    cache, nats = best_cache(copies, config)
    return Trial(
        segment=method.segment,
        settings=dict(method.settings),
        perplexity=_perplexity(total_nats(copies), text.num_words),
        cached_perplexity=_perplexity(nats, text.num_words),
        cache=cache,
        seconds=sum(readings.seconds for readings in copies),
        multiples=method.multiples,
    )


def best_cache(copies: Sequence[Readings], config: TuningConfig) -> tuple[CacheConfig, float]:
    """The cache of the grid with the least total loss, and that loss in nats."""
    best: tuple[float, CacheConfig] | None = None
    for place, theta in enumerate(config.thetas):
        for share in config.shares:
            total = total_nats(copies, place, share)
            if best is None or total < best[0]:
                best = total, CacheConfig(theta=theta, share=share, window=config.window)
    assert best is not None
    return best[1], best[0]


def total_nats(copies: Sequence[Readings], place: int | None = None, share: float = 0.0) -> float:
    """Summed loss of all texts, read by one fast copy or several (see `nats_of_copies`)."""
    return float(sum(nats.sum() for nats in nats_of_copies(copies, place, share)))


Evaluate = Callable[[Sequence[Settings]], Sequence[Trial]]
"""Reads the tuning text once with each of several settings."""


def search(
    evaluate: Evaluate,
    start: Settings,
    steps: Mapping[str, float] = STEPS,
    *,
    halvings: int = 1,
    ahead: bool = False,
) -> list[Trial]:
    """Walks from `start` to settings that no single step of any setting makes better by 0.02 %.

    Args:
        evaluate: reads the tuning text.
        start: where to begin.
        steps: factor by which each setting moves; halved (its square root) after a round without
            gain.
        halvings: how often the factors are halved.
        ahead: try all neighbours at once before each round, where that is cheaper than one by one;
            the walk is the same.

    Returns:
        Every trial, in order.
    """
    trials: dict[tuple[tuple[str, float], ...], Trial] = {}

    def try_these(several: Sequence[Settings]) -> None:
        new = dict.fromkeys(key for key in map(_rounded, several) if key not in trials)
        trials.update(zip(new, evaluate([dict(key) for key in new]) if new else [], strict=True))

    def value(settings: Settings) -> float:
        try_these([settings])
        return trials[_rounded(settings)].perplexity

    current = dict(start)
    for halving in range(halvings + 1):
        factors = {name: steps[name] ** 0.5**halving for name in start}
        while True:
            if ahead:
                try_these([current, *_neighbours(current, factors)])
            after = _round(value, current, factors)
            if after == current:
                break
            current = after
    return list(trials.values())


def _rounded(settings: Settings) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, float(f"{number:.6g}")) for name, number in settings.items()))


def _neighbours(settings: Settings, factors: Settings) -> list[Settings]:
    return [
        {**settings, name: settings[name] * direction}
        for name, factor in factors.items()
        for direction in (factor, 1 / factor)
    ]


def _round(
    value: Callable[[Settings], float], settings: Settings, factors: Settings
) -> dict[str, float]:
    """Moves each setting in turn, up or down by its factor as long as the value falls enough."""
    current = dict(settings)
    for name, factor in factors.items():
        for direction in (factor, 1 / factor):
            best = value(current)
            while value({**current, name: current[name] * direction}) < best * _ENOUGH:
                current[name] *= direction
                best = value(current)
    return current


def tune(
    models: TrainedModels,
    learning: Learning,
    model: ModelName,
    text: TuningText,
    config: TuningConfig,
    report: Callable[[Trial], None] | None = None,
    start: Settings | None = None,
) -> list[Trial]:
    """All trials of one way of learning, over its segment lengths.

    The first segment length is searched in full; for shorter ones rate and decay shrink with the
    segment, as Krause et al. have it, and the rate is searched again.

    Args:
        models: the trained weights.
        learning: the way of learning.
        model: whose weights it starts from.
        text: what is read.
        config: grids.
        report: told every trial.
        start: where the search begins (for the first segment length), such as the settings of the
            other reading mode; by default `STARTS`.
    """
    ahead = len(text.texts) == 1  # several settings then read it side by side

    def evaluate_at(segment: int) -> Evaluate:
        def evaluate(several: Sequence[Settings]) -> Sequence[Trial]:
            one = Method(name="", model=model, learning=learning, segment=segment)
            methods = [one.with_(settings=settings) for settings in several]
            trials = try_methods(models, methods, text, config)
            for trial in trials:
                if report is not None:
                    report(trial)
            return trials

        return evaluate

    if learning == "none":
        return [*evaluate_at(64)([{}])]
    segments = config.segments if learning in ("sgd", "rms") else config.rule_segments
    begin = start or STARTS[learning]
    trials = search(evaluate_at(segments[0]), begin, halvings=config.halvings, ahead=ahead)
    for segment in segments[1:]:
        best = min((t for t in trials if t.segment == segments[0]), key=lambda t: t.perplexity)
        ratio = segment / segments[0]
        shorter = {
            name: value * (ratio if name in SHRINKING else 1.0)
            for name, value in best.settings.items()
        }
        scale = RATES[learning]
        fixed = {name: value for name, value in shorter.items() if name != scale}
        evaluate = evaluate_at(segment)
        trials += search(
            lambda several, fixed=fixed, evaluate=evaluate: evaluate(  # type: ignore[misc]
                [{**fixed, **settings} for settings in several]
            ),
            {scale: shorter[scale]},
            {scale: 1.5},
            halvings=0,
            ahead=ahead,
        )
    return trials


def tune_copies(
    models: TrainedModels,
    learning: Learning,
    model: ModelName,
    text: TuningText,
    config: TuningConfig,
    trials: Sequence[Trial],
    report: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Trials of two fast copies, one with a higher and one with a lower rate than the best one.

    Args:
        models: the trained weights.
        learning: the way of learning.
        model: whose weights it starts from.
        text: what is read.
        config: says how far apart the copies are.
        trials: of one copy; the best without and with a cache are where the two come from.
        report: told every trial.
    """
    alone, cached = (choose_settings(trials, cached=flag) for flag in (False, True))
    found = []
    for best in [alone] if alone == cached else [alone, cached]:
        one = Method(
            name="", model=model, learning=learning, segment=best.segment, settings=best.settings
        )
        methods = [one.with_(multiples=(spread, 1 / spread)) for spread in config.spreads]
        found += try_methods(models, methods, text, config)
    for trial in found:
        if report is not None:
            report(trial)
    return found


def choose_settings(
    trials: Sequence[Trial], *, cached: bool, segment: int | None = None, copies: int = 1
) -> Trial:
    """The best trial of so many copies, with or without a cache, at one segment length or at any.

    Raises:
        ValueError: there is no such trial.
    """
    among = [
        trial
        for trial in trials
        if segment in (None, trial.segment) and len(trial.multiples) == copies
    ]
    return min(among, key=lambda t: t.cached_perplexity if cached else t.perplexity)


def _perplexity(nats: float, words: int) -> float:
    return math.exp(min(700.0, nats / words)) if math.isfinite(nats) else math.inf


def trial_to_json(trial: Trial) -> dict[str, Any]:
    """A trial as JSON values."""
    return {
        "segment": trial.segment,
        "settings": dict(trial.settings),
        "perplexity": trial.perplexity,
        "cached_perplexity": trial.cached_perplexity,
        "cache": {
            "theta": trial.cache.theta,
            "share": trial.cache.share,
            "window": trial.cache.window,
        },
        "seconds": round(trial.seconds, 2),
        "multiples": list(trial.multiples),
    }


def trial_from_json(value: Mapping[str, Any]) -> Trial:
    """The inverse of `trial_to_json`.

    Raises:
        KeyError, TypeError, ValueError: these are not the JSON values of a trial.
    """
    return Trial(
        segment=int(value["segment"]),
        settings={str(name): float(number) for name, number in dict(value["settings"]).items()},
        perplexity=float(value["perplexity"]),
        cached_perplexity=float(value["cached_perplexity"]),
        cache=CacheConfig(**value["cache"]),
        seconds=float(value["seconds"]),
        multiples=tuple(float(number) for number in value.get("multiples", (1.0,))),
    )
