"""Temperatures of the softmax, one a method, chosen on validation articles.

    p_T(x) = softmax(logits / T)_x

scores the tokens, in place of p_1, beside whatever else the method mixes in. What is learnt while
reading stays what it was: the loss of the updates is that of temperature 1. Published figures of
dynamic evaluation are with such a temperature (Melis, Kočiský, Blunsom 2020) or without one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.copy_readings import Begin
from metalm.language.reading.method_readings import MethodReadings, described, read_methods
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import Readings
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.trial_files import weights_of
from metalm.language.text.articles import ArticleSet
from metalm.language.tuning.tuning_text import TuningConfig, tuning_text
from metalm.training.disk import write_at_once
from metalm.training.processes import first_alone


class Temperatures(NamedTuple):
    """Which temperatures are tried, and which a method has."""

    grid: tuple[float, ...]
    """Those that readings score under."""
    chosen: Mapping[str, float]
    """Name of a method -> its temperature, one of the grid."""


def at_temperature(readings: Readings, place: int) -> Readings:
    """The same reading, scored under one of its temperatures."""
    return dataclasses.replace(readings, nats=[of_text[place] for of_text in readings.tempered])


def best_temperature(read: MethodReadings, grid: Sequence[float]) -> float:
    """The temperature of the grid under which a method's total loss is least.

    Args:
        read: readings that were scored under the grid.
        grid: the temperatures.
    """

    def total(place: int) -> float:
        copies = [at_temperature(copy, place) for copy in read.copies]
        return float(sum(nats.sum() for nats in nats_of_copies(copies, read.theta, read.share)))

    return grid[min(range(len(grid)), key=total)]


def run_temperatures(
    models: TrainedModels,
    methods: Sequence[Method],
    articles: ArticleSet,
    config: TuningConfig,
    grid: Sequence[float],
    mode: str,
    folder: LanguageRunFolder,
    report: Callable[[str, float], None] | None = None,
    progress: Begin | None = None,
) -> Temperatures:
    """The temperature of every method, from the run's folder if they are there.

    Methods with a learned mixture have none: their network was trained at temperature 1.

    Args:
        models: the trained weights.
        methods: what is compared.
        articles: the validation articles.
        config: which of their text is read.
        grid: temperatures that are tried; none for no temperatures at all.
        mode: "reset" or "carry".
        folder: where they are kept, with the weights and the settings that they belong to.
        report: told every choice.
        progress: told of every reading as it begins.
    """
    if not grid:
        return Temperatures((), {})
    simple = [method for method in methods if not method.learned_mixture]
    wanted = {
        "grid": list(grid),
        "methods": {method.name: described(method) for method in simple},
        "weights": weights_of(models),
    }
    path = folder.folder / f"temperatures-{mode}.json"
    kept = _kept(path)
    if kept is not None and {key: kept.get(key, of) for key, of in wanted.items()} == wanted:
        return Temperatures(tuple(grid), dict(kept["chosen"]))
    text = tuning_text(articles, config, mode)
    read = read_methods(
        models, simple, text.texts, config.rows, temperatures=grid, progress=progress
    )
    chosen = {
        method.name: best_temperature(of_method, grid)
        for method, of_method in zip(simple, read, strict=True)
    }
    for name, temperature in chosen.items():
        if report is not None:
            report(name, temperature)
    content = json.dumps(wanted | {"chosen": chosen}, indent=1) + "\n"
    first_alone(lambda: write_at_once(path, content))
    return Temperatures(tuple(grid), chosen)


def _kept(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
        kept["chosen"] = {str(name): float(value) for name, value in dict(kept["chosen"]).items()}
        for name, value in kept["chosen"].items():
            if value not in kept["grid"]:
                raise ValueError(f"{value} of {name}, which is not in the grid")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read; expected the temperatures that tuning wrote, found "
            f"'{type(error).__name__}: {error}'; delete it to choose them again"
        ) from error
    return kept
