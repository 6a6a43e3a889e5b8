"""The models and rules that a run's trainings left, loaded for reading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from metalm.adapt.reading_state import checksum
from metalm.language.network.model import LanguageModel
from metalm.language.reading.article_starts import ArticleStarts, train_article_starts
from metalm.language.reading.methods import TrainedModels
from metalm.language.run.presets import ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.text.articles import ArticleSet
from metalm.language.training.meta_training_config import empty_rule
from metalm.language.training.statistics import gradient_rms
from metalm.meta.parameters import Parameters, choose
from metalm.meta.rules.kinds import LearnedRule
from metalm.training.processes import as_first
from metalm.training.record import Progress
from metalm.training.state import unpack


def load_trained(
    folder: LanguageRunFolder,
    config: ExperimentConfig,
    training_articles: ArticleSet | None,
    *,
    segments: Sequence[int] | None = None,
) -> TrainedModels:
    """Everything that reading needs, from the files of a run.

    Args:
        folder: the run.
        config: its configuration.
        training_articles: for the gradient statistics of dynamic evaluation, which are worked out
            once and kept in the folder; None where they are there already.
        segments: lengths to have them for; None for those that tuning tries.

    Raises:
        ValueError: a stage has not finished, a file is damaged, or the weights are of another size.
    """
    models: dict[str, LanguageModel] = {}
    rules: dict[str, LearnedRule] = {}
    for name in ("control", "joint"):
        if folder.has(name):
            models[name] = load_model(folder, name, config)
    if {"joint", "control"} <= models.keys() and _are_same(models["joint"], models["control"]):
        models["joint"] = models["control"]  # one model, with which rivals read side by side
    empty = LanguageModel(config.model)
    names = choose(empty, config.rule.adapt)
    rival_names = choose(empty, config.tuning.adapt)
    for name in ("rule", "joint"):
        if folder.has(name):
            rules[name] = load_rule(folder, name, config, names)
    if "control" not in models:
        folder.load("control")  # says what is missing
    wanted = sorted({*(config.tuning.segments if segments is None else segments)})
    statistics = {
        segment: control_statistics(
            folder, config, models["control"], rival_names, segment, training_articles
        )
        for segment in wanted
    }
    starts = article_starts(folder, config, training_articles) if config.tuning.flush else None
    return TrainedModels(
        starts=starts,
        models=models,
        rules=rules,
        rival_names=rival_names,
        statistics=statistics,
        surprises={"rule": config.rule.surprise, "joint": config.joint.surprise},
    )


def load_model(folder: LanguageRunFolder, name: str, config: ExperimentConfig) -> LanguageModel:
    """The language model of a stage, ready to read.

    Raises:
        ValueError: the weights do not fit the configuration; the message names the first that
            differs.
    """
    tree = unpack(*folder.load(name))
    model = LanguageModel(config.model)
    _check_shapes(folder, name, model.state_dict(), tree["model"])
    model.load_state_dict(tree["model"])
    return model.to(config.device).eval().requires_grad_(False)


def load_rule(
    folder: LanguageRunFolder, name: str, config: ExperimentConfig, names: Iterable[str]
) -> LearnedRule:
    """The update rule of a stage."""
    tree = unpack(*folder.load(name))
    rule = empty_rule(LanguageModel(config.model), config.rule, names)
    _check_shapes(folder, name, rule.state_dict(), tree["rule"])
    rule.load_state_dict(tree["rule"])
    return rule.to(config.device).requires_grad_(False)


def article_starts(
    folder: LanguageRunFolder, config: ExperimentConfig, training_articles: ArticleSet | None
) -> ArticleStarts | None:
    """What tells where articles begin; trained once and kept in the run's folder.

    None where it is not there and nothing is given to train it on.
    """
    size, name = config.model.vocabulary_size, "article-starts"
    if not folder.has(name):
        if training_articles is None:
            return None
        network = train_article_starts(training_articles, size, config.seed)
        folder.save(name, network.state_dict(), {})
    network = ArticleStarts(size)
    network.load_state_dict(folder.load(name)[0])
    return network.to(config.device).eval().requires_grad_(False)


def control_statistics(
    folder: LanguageRunFolder,
    config: ExperimentConfig,
    model: LanguageModel,
    names: tuple[str, ...],
    segment: int,
    training_articles: ArticleSet | None,
) -> Parameters:
    """RMS of the training set's gradients for one segment length; kept in the run's folder.

    Those of other weights are counted again.

    Raises:
        ValueError: they are not there, or of other weights, and there is nothing to count them on.
    """
    name, own = f"statistics-{segment}", checksum(model)
    if folder.has(name):
        tensors, meta = folder.load(name)
        if meta.get("model", own) == own:  # older files do not say it
            return {name: tensors[name].to(config.device) for name in names}
        if training_articles is None:
            raise ValueError(
                f"{folder.weights(name)} is of other weights; expected statistics of "
                f"{folder.weights('control')}, found those of another model; delete it, and "
                "evaluate.py on the run counts them again"
            )
    elif training_articles is None:
        folder.load(name)  # says what is missing
        raise AssertionError("unreachable")
    rms = count_gradients(config, model, training_articles, names, segment)
    folder.save(name, rms, {"model": own})
    return rms


def count_gradients(
    config: ExperimentConfig,
    model: LanguageModel,
    articles: ArticleSet,
    names: Sequence[str],
    segment: int,
) -> Parameters:
    """`gradient_rms` over as many batches as the configuration says, with a progress bar.

    Several processes count the same, and take what the first has found.
    """
    bars: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if done == 1:
            bars.append(Progress(f"gradient statistics, segments of {segment}", total))
        bars[0].update()

    try:
        batches = config.statistics_batches
        rms = gradient_rms(model, articles, names, segment, batches=batches, progress=progress)
    finally:
        for bar in bars:
            bar.close()
    as_first(list(rms.values()))
    return rms


def _are_same(one: LanguageModel, other: LanguageModel) -> bool:
    """Whether two models have the same weights."""
    weights = other.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())


def _check_shapes(
    folder: LanguageRunFolder, name: str, expected: Parameters, found: Parameters
) -> None:
    for key in sorted(expected.keys() | found.keys()):
        wanted = tuple(expected[key].shape) if key in expected else "nothing"
        given = tuple(found[key].shape) if key in found else "nothing"
        if wanted != given:
            raise ValueError(
                f"{folder.weights(name)} does not fit the configuration; expected {key} of shape "
                f"{wanted}, "
                f"found {given}; use the preset and the overrides that the run was trained with"
            )
