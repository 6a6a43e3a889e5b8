"""What is compared, with the settings that validation articles chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.copy_readings import Begin
from metalm.language.reading.methods import (
    FLUSHED,
    NAMES,
    Learning,
    Method,
    ModelName,
    TrainedModels,
    between_flushes,
)
from metalm.language.text.articles import ArticleSet
from metalm.language.tuning.trials import BegunTrials, Trial, choose_settings
from metalm.language.tuning.tune import tune, tune_copies
from metalm.language.tuning.tuning_text import Mode, TuningConfig, tuning_text

Trials = dict[str, list[Trial]]
"""Way of learning -> its trials."""

# What is tuned: the name under which the trials are kept, the way of learning, and whose weights.
TUNED: tuple[tuple[str, Learning, ModelName], ...] = (
    ("none", "none", "control"),
    ("sgd", "sgd", "control"),
    ("rms", "rms", "control"),
    ("rule", "rule", "control"),
    ("joint", "joint", "joint"),
    ("rms-flush", "rms-flush", "control"),
    ("joint-flush", "joint-flush", "joint"),
)

# What is tried with two rates: metalm, and the best rival, so that both have the same means.
_IN_TWO: tuple[Learning, ...] = ("rms", "joint", "rms-flush", "joint-flush")

# Where, beside a cache with a fixed lambda, one is compared whose lambda a network says.
_LEARNED_CACHE: tuple[Learning, ...] = ("none", *_IN_TWO)

# Fast copies, what is said of them, and whether a network adjusts their mixture.
_WAYS_TO_MIX: tuple[tuple[int, str, bool], ...] = (
    (1, "", False),
    (2, ", two rates", False),
    (2, ", learned mixture", True),
)

# With a cache, settings this close to the best count as good: those without a cache are preferred,
# and one reading of each copy serves both. Two copies save two readings.
_AS_GOOD = {1: 1.001, 2: 1.002}


def tune_all(
    models: TrainedModels,
    articles: ArticleSet,
    config: TuningConfig,
    mode: Mode,
    known: Trials | None = None,
    other: Trials | None = None,
    report: Callable[[str, Trial], None] | None = None,
    keep: Callable[[Trials], None] | None = None,
    ablations: bool = True,
    progress: Begin | None = None,
    begun: BegunTrials | None = None,
) -> Trials:
    """Trials of every way of learning whose model is there; those already known are not repeated.

    Args:
        models: the trained weights.
        articles: the validation articles.
        config: text and grids.
        mode: "reset" or "carry".
        known: trials of an earlier call.
        other: trials of another reading mode, from whose best settings the search begins.
        report: told every trial.
        keep: told all trials whenever a way of learning is done.
        ablations: whether what `compared_methods` adds for them is tuned too.
        progress: told of every reading as it begins.
        begun: trials of searches that were stopped, which are not read again; and of these.
    """
    text = tuning_text(articles, config, mode)
    trials: Trials = dict(known or {})
    begun = begun or BegunTrials()
    for name, learning, model in TUNED:
        if not _is_tuned(models, learning, model, mode, ablations):
            continue

        before = begun.of(name)

        def tell(trial: Trial, name: str = name) -> None:
            if report is not None:
                report(name, trial)
            begun.add(name, trial)

        if name not in trials:
            # A flush leaves what the other mode has: articles that begin from W_0.
            start = _start((other or {}).get(between_flushes(learning), []), config, learning)
            trials[name] = tune(
                models, learning, model, text, config, tell, start, progress, before
            )
            if keep is not None:
                keep(trials)
        if learning in _IN_TWO and not any(len(t.multiples) > 1 for t in trials[name]):
            more = tune_copies(
                models, learning, model, text, config, trials[name], tell, progress, before
            )
            trials[name] = [*trials[name], *more]
            if keep is not None and more:
                keep(trials)
        begun.done(name)
    return trials


def _is_tuned(
    models: TrainedModels, learning: Learning, model: ModelName, mode: Mode, ablations: bool
) -> bool:
    if model not in models.models or (learning == "rule" and not ablations):
        return False
    if learning in FLUSHED and (mode != "carry" or models.starts is None):
        return False  # where every article begins from W_0 there is nothing to flush
    known = between_flushes(learning)
    return known not in ("rule", "joint") or known in models.rules


def _start(
    trials: Sequence[Trial], config: TuningConfig, learning: Learning
) -> Mapping[str, float] | None:
    """Best settings at the segment length that is searched in full, if there are trials of it."""
    known = between_flushes(learning)
    segments = config.segments if known in ("sgd", "rms") else config.rule_segments
    if not any(trial.segment == segments[0] for trial in trials):
        return None
    return choose_settings(trials, cached=False, segment=segments[0]).settings or None


def compared_methods(
    trials: Trials,
    *,
    ablations: bool = True,
    learned_cache: bool = False,
    one_model: bool = False,
) -> list[Method]:
    """The lines of the comparison, with the settings that validation chose.

    Dynamic evaluation by plain gradients (sgd) has a cache only if rms with one is not better.

    Args:
        trials: of every way of learning that is compared.
        ablations: whether metalm is there with W_0 frozen too, and at its longest segments.
        learned_cache: whether one copy is there also with a cache whose lambda a network says.
        one_model: whether metalm has the rivals' W_0; it is then not there without learning, which
            would be the static model again.
    """
    methods: list[Method] = []
    for name, learning, model in TUNED:
        if not trials.get(name) or (learning == "rule" and not ablations):
            continue
        if learning == "joint" and not one_model:
            methods.append(
                Method(name="metalm, not learning", model="joint", learning="none", segment=64)
            )
        for copies, suffix, learned in _WAYS_TO_MIX:
            if not any(len(trial.multiples) == copies for trial in trials[name]):
                continue
            alone = choose_settings(trials[name], cached=False, copies=copies)
            cached = choose_settings(trials[name], cached=True, copies=copies)
            if alone.cached_perplexity < cached.cached_perplexity * _AS_GOOD[copies]:
                cached = alone
            title = NAMES[learning] + suffix
            methods.append(_method(title, learning, model, alone, None, learned))
            if learning == "rule" or (learning == "sgd" and _is_better(trials, "rms")):
                continue  # an ablation, or not the best rival with a cache: not asked
            title = "cache" if learning == "none" else f"{title} + cache"
            methods.append(_method(title, learning, model, cached, cached.cache, learned))
            own = learned_cache and cached.cache.share > 0.0
            if own and copies == 1 and learning in _LEARNED_CACHE:
                title = f"{NAMES[learning]} + " if learning != "none" else ""
                title += "learned cache"
                methods.append(_method(title, learning, model, cached, cached.cache, True))
    longest = max((t.segment for t in trials.get("joint", [])), default=0)
    main = [m for m in methods if m.name == NAMES["joint"]]
    if ablations and main and main[0].segment != longest:
        best = choose_settings(trials["joint"], cached=False, segment=longest)
        name = f"metalm, segments of {longest}"
        methods.insert(methods.index(main[0]), _method(name, "joint", "joint", best, None))
    return methods


def _is_better(trials: Trials, name: str) -> bool:
    """Whether, with a cache, dynamic evaluation of that name is better than by plain gradients."""
    return bool(trials.get(name)) and (
        choose_settings(trials[name], cached=True).cached_perplexity
        < choose_settings(trials["sgd"], cached=True).cached_perplexity
    )


def _method(
    name: str,
    learning: Learning,
    model: ModelName,
    trial: Trial,
    cache: CacheConfig | None,
    learned_mixture: bool = False,
) -> Method:
    return Method(
        name=name,
        model=model,
        learning=learning,
        segment=trial.segment,
        settings=trial.settings,
        cache=cache,
        multiples=trial.multiples,
        learned_mixture=learned_mixture,
    )
