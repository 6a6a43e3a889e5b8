"""Choosing the settings of every method on validation articles, with the same care for each.

The search walks (`settings_search.py`): at the longest segments over all settings and then in half
steps, at shorter ones over the rate. Every trial is also mixed with the cache over a grid of theta
and lambda. Last walks over all settings go from the best trial and from the best with a cache,
so that a method with a cache has settings of its own; where the configuration says so, they go
once more with surprising tokens weighing more. All trials are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.copy_readings import Begin, Request, read_copies
from metalm.language.reading.methods import (
    NAMES,
    RATES,
    STEPS,
    SURPRISE,
    Learning,
    Method,
    ModelName,
    TrainedModels,
    between_flushes,
)
from metalm.language.reading.reader import CacheGrid, Readings
from metalm.language.tuning.settings_search import Evaluate, search
from metalm.language.tuning.trials import Settings, Trial, choose_settings
from metalm.language.tuning.tuning_text import TuningConfig, TuningText

# What shrinks with the segment: shorter segments update more often.
SHRINKING = ("rate", "decay", "rate_scale", "decay_scale")


def try_methods(
    models: TrainedModels,
    methods: Sequence[Method],
    text: TuningText,
    config: TuningConfig,
    progress: Begin | None = None,
) -> list[Trial]:
    """Reads the tuning text with each method, and mixes the results with every cache of the grid.

    Of a single text, methods and copies that fit together are read side by side.

    Args:
        models: the trained weights.
        methods: what is tried.
        text: what is read.
        config: grids.
        progress: told of every reading as it begins.
    """
    grid = CacheGrid(thetas=config.thetas, window=config.window)
    requests = [Request(copy, grid) for method in methods for copy in method.copies()]
    read: dict[int, Readings] = {}
    for places, several in read_copies(
        models, requests, text.texts, config.rows, progress=progress
    ):
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


def tune(
    models: TrainedModels,
    learning: Learning,
    model: ModelName,
    text: TuningText,
    config: TuningConfig,
    report: Callable[[Trial], None] | None = None,
    start: Settings | None = None,
    progress: Begin | None = None,
    begun: Sequence[Trial] = (),
) -> list[Trial]:
    """All trials of one way of learning, over its segment lengths.

    The first segment length is searched in full; for shorter ones rate and decay shrink with the
    segment, as Krause et al. have it, and the rate is searched again. Then come the `last_walks`.

    Args:
        models: the trained weights.
        learning: the way of learning.
        model: whose weights it starts from.
        text: what is read.
        config: grids.
        report: told every trial.
        start: where the search begins (for the first segment length), such as the settings of the
            other reading mode; by default that of the models.
        progress: told of every reading as it begins.
        begun: trials of the same search, which was stopped: they are not read again, nor reported.
    """
    evaluate_at = evaluator(models, learning, model, text, config, report, progress, begun)
    if learning == "none":
        return [*evaluate_at(64)([{}])]
    ahead = len(text.texts) == 1  # several settings then read it side by side
    known = between_flushes(learning)
    segments = config.segments if known in ("sgd", "rms") else config.rule_segments
    begin = start or models.start(learning)
    trials = search(evaluate_at(segments[0]), begin, halvings=config.halvings, ahead=ahead)
    for segment in segments[1:]:
        best = choose_settings(trials, cached=False, segment=segments[0])
        ratio = segment / segments[0]
        shorter = {
            name: value * (ratio if name in SHRINKING else 1.0)
            for name, value in best.settings.items()
        }
        scale = RATES[known]
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
    trials = [*trials, *last_walks(evaluate_at, trials, ahead=ahead)]
    if config.surprise:
        trials += last_walks(evaluate_at, trials, ahead=ahead, surprise=config.surprise)
    return trials


def evaluator(
    models: TrainedModels,
    learning: Learning,
    model: ModelName,
    text: TuningText,
    config: TuningConfig,
    report: Callable[[Trial], None] | None = None,
    progress: Begin | None = None,
    begun: Sequence[Trial] = (),
) -> Callable[[int], Evaluate]:
    """For each segment length, what tries settings of a way of learning; see `tune`."""

    def evaluate_at(segment: int) -> Evaluate:
        def evaluate(several: Sequence[Settings]) -> Sequence[Trial]:
            name = f"{NAMES[learning]}, segments of {segment}"
            one = Method(name=name, model=model, learning=learning, segment=segment)
            methods = [one.with_(settings=settings) for settings in several]
            return _try_new(models, methods, text, config, report, progress, begun)

        return evaluate

    return evaluate_at


def _try_new(
    models: TrainedModels,
    methods: Sequence[Method],
    text: TuningText,
    config: TuningConfig,
    report: Callable[[Trial], None] | None,
    progress: Begin | None,
    begun: Sequence[Trial],
) -> list[Trial]:
    """The trial of each method; one that is there is not tried again, nor reported."""

    def key(of: Method | Trial) -> tuple[object, ...]:
        return of.segment, of.multiples, tuple(sorted(of.settings.items()))

    known = {key(trial): trial for trial in begun}
    new = [method for method in methods if key(method) not in known]
    for trial in try_methods(models, new, text, config, progress) if new else []:
        known[key(trial)] = trial
        if report is not None:
            report(trial)
    return [known[key(method)] for method in methods]


def last_walks(
    evaluate_at: Callable[[int], Evaluate],
    trials: Sequence[Trial],
    *,
    ahead: bool,
    surprise: float = 0.0,
) -> list[Trial]:
    """Walks in half steps over all settings, at whatever segment length is the best.

    From the best trial without a cache first, then from the best with one, looking at the
    perplexity with it.

    Args:
        evaluate_at: see `evaluator`.
        trials: what was tried already.
        ahead: see `search`.
        surprise: with which the walks begin; 0 begins with that of the best trial.

    Returns:
        The new trials.
    """
    half = {name: factor**0.5 for name, factor in STEPS.items()}
    found: list[Trial] = []
    for cached in (False, True):
        so_far = [*trials, *found]
        best = choose_settings(so_far, cached=cached)
        found += search(
            evaluate_at(best.segment),
            {**best.settings, SURPRISE: surprise} if surprise else best.settings,
            half,
            halvings=0,
            ahead=ahead,
            known=[trial for trial in so_far if trial.segment == best.segment],
            goal=attrgetter("cached_perplexity" if cached else "perplexity"),
        )
    return found


def tune_copies(
    models: TrainedModels,
    learning: Learning,
    model: ModelName,
    text: TuningText,
    config: TuningConfig,
    trials: Sequence[Trial],
    report: Callable[[Trial], None] | None = None,
    progress: Begin | None = None,
    begun: Sequence[Trial] = (),
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
        progress: told of every reading as it begins.
        begun: see `tune`.
    """
    alone, cached = (choose_settings(trials, cached=flag) for flag in (False, True))
    found = []
    for best in [alone] if alone == cached else [alone, cached]:
        one = Method(
            name=f"{NAMES[learning]}, two rates",
            model=model,
            learning=learning,
            segment=best.segment,
            settings=best.settings,
        )
        methods = [one.with_(multiples=(spread, 1 / spread)) for spread in config.spreads]
        found += _try_new(models, methods, text, config, report, progress, begun)
    return found


def _perplexity(nats: float, words: int) -> float:
    return math.exp(min(700.0, nats / words)) if math.isfinite(nats) else math.inf
