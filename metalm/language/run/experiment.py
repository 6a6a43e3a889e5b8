"""One experiment on text: train, tune on validation articles, score a split, report.

Everything is kept in the run's folder as it is finished, and what is there already is not done
again. Of several processes (`metalm.training.processes`) all go the same way through this file; the
first alone writes, prints and measures what reading costs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from metalm.analysis.report import write_report
from metalm.analysis.tables import Cost, print_tables
from metalm.language.reading.methods import Method, TrainedModels, between_flushes
from metalm.language.reading.progress import ReadingProgress
from metalm.language.reading.store import ReadingStore
from metalm.language.run.mixtures import Mixtures, run_mixtures
from metalm.language.run.presets import ExperimentConfig
from metalm.language.run.reading_cost import reading_costs
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import Scored, score_split
from metalm.language.run.stages import Stages
from metalm.language.run.temperatures import Temperatures, run_temperatures
from metalm.language.run.trained import load_trained
from metalm.language.run.trial_files import (
    begun_trials,
    forget_begun,
    read_trials,
    weights_of,
    write_trials,
)
from metalm.language.text.articles import ArticleSet, Corpus
from metalm.language.tuning.comparison import TUNED, Trials, compared_methods, tune_all
from metalm.language.tuning.trials import Trial
from metalm.training.processes import first_alone, is_first

SPLITS = ("valid", "test")
MODES = ("reset", "carry")


def train(
    config: ExperimentConfig, corpus: Corpus, folder: LanguageRunFolder, stages: Sequence[str]
) -> None:
    """Runs these trainings one after the other; each goes on where it was stopped.

    Raises:
        ValueError: an unknown stage, or one whose predecessor is missing, before anything is
            trained; or a folder that belongs to another run.
    """
    trainings = Stages(config, corpus, folder)
    trainings.refuse_unready(stages)
    first_alone(lambda: folder.write_configuration(config))
    first_alone(lambda: corpus.vocabulary.save(folder.vocabulary_path))
    for name in stages:
        trainings.train(name)


def tune(
    config: ExperimentConfig,
    models: TrainedModels,
    corpus: Corpus,
    folder: LanguageRunFolder,
    mode: str,
) -> Trials:
    """Tunes every method for one reading mode on validation articles; keeps all trials.

    Raises:
        ValueError: trials of the folder are damaged, or of weights that are others or not there.
    """
    weights = weights_of(models)
    known = read_trials(folder, mode, weights)
    _refuse_missing(folder, known)
    others = (read_trials(folder, other) for other in MODES if other != mode)

    def report(name: str, trial: Trial) -> None:
        text = "".join(f", {key} {value:.3g}" for key, value in sorted(trial.settings.items()))
        _say(
            f"tuning ({mode}) {name}, segments of {trial.segment}{text}: perplexity "
            f"{trial.perplexity:.2f}, with cache {trial.cached_perplexity:.2f}"
        )

    with ReadingProgress(f"tuning, {mode}") as progress:
        trials = tune_all(
            models,
            corpus.valid,
            config.tuning,
            mode,
            known,
            next(others, None),
            report,
            partial(write_trials, folder, mode, weights),
            ablations=mode in config.evaluation.ablations,
            progress=progress,
            begun=begun_trials(config, weights, corpus, folder, mode),
        )
    forget_begun(folder, mode)
    return trials


def _refuse_missing(folder: LanguageRunFolder, trials: Trials) -> None:
    """Checks that everything that was tuned is still there."""
    for name, learning, model in TUNED:
        stage = between_flushes(learning) if learning in ("rule", "joint") else model
        if trials.get(name) and not folder.has(stage):
            folder.load(stage)  # says what is missing


def _say(words: str) -> None:
    if is_first():
        print(words, file=sys.stderr, flush=True)


def compared(config: ExperimentConfig, trials: Trials, mode: str) -> list[Method]:
    """What a run compares in one mode."""
    return compared_methods(
        trials,
        ablations=mode in config.evaluation.ablations,
        learned_cache=config.tuning.learned_cache,
        one_model=config.joint.tokens == 0,
    )


def mix(
    config: ExperimentConfig,
    models: TrainedModels,
    trials: Trials,
    corpus: Corpus,
    folder: LanguageRunFolder,
    mode: str,
) -> Mixtures:
    """Trains the mixtures that are compared in one mode, on validation articles; keeps them."""

    def say(name: str) -> None:
        _say(f"training the mixture ({mode}) of {name}")

    methods = compared(config, trials, mode)
    with ReadingProgress(f"mixtures, {mode}") as progress:
        return run_mixtures(
            models, methods, corpus.valid, config.tuning, mode, folder, say, progress
        )


def choose_temperatures(
    config: ExperimentConfig,
    models: TrainedModels,
    trials: Trials,
    corpus: Corpus,
    folder: LanguageRunFolder,
    mode: str,
) -> Temperatures:
    """Chooses a temperature for every method on validation articles; keeps them."""

    def say(name: str, temperature: float) -> None:
        _say(f"temperature ({mode}) of {name}: {temperature:.3g}")

    methods = compared(config, trials, mode)
    grid = config.evaluation.temperatures
    with ReadingProgress(f"temperatures, {mode}") as progress:
        return run_temperatures(
            models, methods, corpus.valid, config.tuning, grid, mode, folder, say, progress
        )


def score(
    config: ExperimentConfig,
    models: TrainedModels,
    trials: Trials,
    articles: ArticleSet,
    folder: LanguageRunFolder,
    split: str,
    mode: str,
    mixtures: Mixtures | None = None,
    unknown: int | None = None,
    temperatures: Temperatures | None = None,
) -> Scored:
    """Scores a split in one mode; every finished reading is kept in the run's folder."""
    name, bfloat16 = f"{_named(split, config)}-{mode}", config.evaluation.bfloat16
    store = ReadingStore(folder.folder / "readings" / name)
    methods = compared(config, trials, mode)
    with ReadingProgress(f"{split}, {mode}") as progress:
        rows = config.evaluation.rows
        scored = score_split(
            models,
            methods,
            articles,
            mode,
            store,
            rows,
            progress,
            mixtures,
            unknown,
            temperatures,
            bfloat16=bfloat16,
        )
    first_alone(lambda: scored.scores.save(folder.folder / f"scores-{name}.npz"))
    return scored


def _named(split: str, config: ExperimentConfig) -> str:
    """How files about a split are called; what was read in bfloat16 has names of its own."""
    return f"{split}-bfloat16" if config.evaluation.bfloat16 else split


def tune_run(
    config: ExperimentConfig,
    corpus: Corpus,
    folder: LanguageRunFolder,
    modes: Sequence[str] | None = None,
) -> dict[str, Trials]:
    """Tunes every method in every mode, as far as the run is trained; keeps all trials."""
    models = load_trained(folder, config, Stages(config, corpus, folder).base_articles)
    return {
        mode: tune(config, models, corpus, folder, mode)
        for mode in modes or config.evaluation.modes
    }


def evaluate(
    config: ExperimentConfig,
    corpus: Corpus,
    folder: LanguageRunFolder,
    *,
    split: str = "test",
    modes: Sequence[str] | None = None,
    command: str = "",
    other: Corpus | None = None,
) -> Path:
    """Tunes if need be, scores a split in every mode, prints the tables and writes the report.

    Args:
        config: of the run.
        corpus: what the run was trained on; methods are tuned on its validation articles.
        folder: the run.
        split: which articles are scored.
        modes: reading modes; None takes the configuration's.
        command: what the report says made it.
        other: another corpus under the same vocabulary, to be scored in place of the run's own.

    Returns:
        The path of report.md.
    """
    if split not in SPLITS:
        raise ValueError(
            f"unknown split; expected {' or '.join(SPLITS)}, found {split!r}; choose one of them"
        )
    trainings = Stages(config, corpus, folder)
    models = load_trained(folder, config, trainings.base_articles)
    title = split if other is None else f"{other.folder.name}-{split}"
    articles = getattr(other or corpus, split)
    scored: dict[str, Scored] = {}
    cost: dict[str, Cost] = {}
    for mode in modes or config.evaluation.modes:
        trials = tune(config, models, corpus, folder, mode)
        mixtures = mix(config, models, trials, corpus, folder, mode)
        warm = choose_temperatures(config, models, trials, corpus, folder, mode)
        unknown = corpus.vocabulary.unknown
        found = score(
            config, models, trials, articles, folder, title, mode, mixtures, unknown, warm
        )
        scored[mode] = found
        methods = compared(config, trials, mode)
        cost[mode] = first_alone(partial(_cost, config, models, methods, articles, mode, found))

    def report() -> Path:
        scores = {mode: found.scores for mode, found in scored.items()}
        tempered = {mode: of.tempered for mode, of in scored.items() if of.tempered is not None}
        print_tables(scores, cost, tempered=tempered)
        configuration: dict[str, Any] = dataclasses.asdict(config)
        return write_report(
            scores,
            folder.folder / f"report-{_named(title, config)}",
            configuration=configuration,
            cost=cost,
            command=command,
            traces={mode: found.traces for mode, found in scored.items()},
            tempered=tempered,
            title=f"{folder.folder.resolve().name}: {title} articles"
            + (", products in bfloat16" if config.evaluation.bfloat16 else ""),
        )

    return first_alone(report)


def _cost(
    config: ExperimentConfig,
    models: TrainedModels,
    methods: Sequence[Method],
    articles: ArticleSet,
    mode: str,
    scored: Scored,
) -> Cost:
    rows, bfloat16 = config.evaluation.rows, config.evaluation.bfloat16
    measured = reading_costs(models, methods, articles, mode, rows, bfloat16=bfloat16)
    return {
        name: {**of_method, "fallbacks": scored.fallbacks[name]}
        for name, of_method in measured.items()
    }
