"""The trials of a run on disk: finished searches, and one that was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from metalm.adapt.reading_state import checksum
from metalm.language.reading.methods import TrainedModels
from metalm.language.run.presets import ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.text.articles import Corpus
from metalm.language.tuning.comparison import Trials
from metalm.language.tuning.trials import BegunTrials, trial_from_json, trial_to_json
from metalm.language.tuning.tuning_text import tuning_text
from metalm.training.disk import write_at_once
from metalm.training.processes import first_alone


def _tuning_path(folder: LanguageRunFolder, mode: str) -> Path:
    return folder.folder / f"tuning-{mode}.json"


Weights = Mapping[str, str]
"""What was tuned -> the checksum of its weights."""


def weights_of(models: TrainedModels) -> Weights:
    """Of everything that trials depend on; the statistics follow from the weights."""
    named: dict[str, nn.Module | None] = {
        **{f"model {name}": model for name, model in models.models.items()},
        **{f"rule {name}": rule for name, rule in models.rules.items()},
        "article starts": models.starts,
    }
    return {name: checksum(module) for name, module in named.items() if module is not None}


def read_trials(folder: LanguageRunFolder, mode: str, weights: Weights | None = None) -> Trials:
    """The trials of a reading mode that are there so far; none if it was not tuned.

    Args:
        folder: of the run.
        mode: "reset" or "carry".
        weights: what will be read with; None where that does not matter.

    Raises:
        ValueError: the file is damaged, or the trials are those of other weights.
    """
    path = _tuning_path(folder, mode)
    if not path.exists():
        return {}
    with _named_if_damaged(path):
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
        known, trials = dict(stored["weights"]), _from_json(stored["trials"])
    expected = (weights or {}).items()
    other = [name for name, its in expected if known.get(name, its) != its]
    if other:
        raise ValueError(
            f"the settings in {path} were chosen for other weights; expected those of this run, "
            f"found another {' and '.join(other)}; restore them, or delete the file to tune again"
        )
    return trials


def write_trials(folder: LanguageRunFolder, mode: str, weights: Weights, trials: Trials) -> None:
    """Keeps the trials of every search that is done, and of which weights they are."""
    content = {"weights": dict(weights), "trials": _as_json(trials)}
    first_alone(lambda: _write(_tuning_path(folder, mode), content))


def begun_trials(
    config: ExperimentConfig, weights: Weights, corpus: Corpus, folder: LanguageRunFolder, mode: str
) -> BegunTrials:
    """The trials of a search that was stopped, and those of this one, which are kept after each.

    None are there at first if they are of other weights, text or grids.
    """
    path = _begun_path(folder, mode)
    of = _what_trials_depend_on(config, weights, corpus, mode)

    def keep(trials: Trials) -> None:
        first_alone(lambda: _write(path, {"of": of, "trials": _as_json(trials)}))

    return BegunTrials(_trials_of(path, of), keep)


def forget_begun(folder: LanguageRunFolder, mode: str) -> None:
    """Removes what was kept of a search that is done."""
    first_alone(lambda: _begun_path(folder, mode).unlink(missing_ok=True))


def _begun_path(folder: LanguageRunFolder, mode: str) -> Path:
    return folder.folder / f"tuning-{mode}-begun.json"


def _trials_of(path: Path, of: str) -> Trials:
    if not path.exists():
        return {}
    with _named_if_damaged(path):
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
        return _from_json(stored["trials"]) if stored.get("of") == of else {}


def _what_trials_depend_on(
    config: ExperimentConfig, weights: Weights, corpus: Corpus, mode: str
) -> str:
    """SHA-256 of settings, text and weights."""
    text = tuning_text(corpus.valid, config.tuning, mode)
    description = {
        "tuning": dataclasses.asdict(config.tuning),
        "text": [tokens.tolist() for tokens in text.texts],
        "words": text.num_words,
        "weights": dict(weights),
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    write_at_once(path, json.dumps(content, indent=1) + "\n")


def _as_json(trials: Trials) -> dict[str, Any]:
    return {name: [trial_to_json(trial) for trial in found] for name, found in trials.items()}


def _from_json(stored: dict[str, Any]) -> Trials:
    return {name: [trial_from_json(t) for t in trials] for name, trials in dict(stored).items()}


@contextmanager
def _named_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read; expected the trials that tuning wrote, found "
            f"'{type(error).__name__}: {error}'; delete it to tune again"
        ) from error
