"""A run that train.py wrote, opened for reading: its folder, its configuration and its corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from metalm.language.reading.methods import TrainedModels
from metalm.language.run.presets import ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.stages import Stages
from metalm.language.run.trained import load_trained
from metalm.language.text.articles import ArticleSet, Corpus, open_corpus
from metalm.language.text.data_config import DataConfig
from metalm.training.configuration import from_json


class OpenedRun(NamedTuple):
    """What `open_run` finds."""

    folder: LanguageRunFolder
    config: ExperimentConfig
    corpus: Corpus

    @property
    def stages(self) -> Stages:
        """Its trainings, which know what each of them read."""
        return Stages(self.config, self.corpus, self.folder)

    @property
    def base_articles(self) -> ArticleSet:
        """What the base has read."""
        return self.stages.base_articles

    def trained(self) -> TrainedModels:
        """Its models and rules; see `load_trained`."""
        return load_trained(self.folder, self.config, self.base_articles)


def read_experiment(folder: LanguageRunFolder) -> ExperimentConfig:
    """The configuration of a run on text.

    Raises:
        ValueError: no run, one of few-shot learning, or one of another version.
    """
    found = folder.read_configuration()
    if "scoring" in found:
        raise ValueError(
            f"{folder.folder} is no run on text; expected one of train.py, found one of train.py "
            "fewshot; choose another folder, or score it with evaluate.py alone"
        )
    return from_json(ExperimentConfig, found)


def open_run(path: Path | str, prepare: Callable[[DataConfig], Path]) -> OpenedRun:
    """Opens a run and the corpus that it was trained on.

    Args:
        path: the run's folder.
        prepare: gives the folder of the prepared corpus (`data_prep.corpora.prepare_as`).

    Raises:
        ValueError: no run, a file of it or of the corpus that is missing or damaged, or a corpus
            with another vocabulary.
    """
    folder = LanguageRunFolder(path)
    config = read_experiment(folder)
    corpus = open_corpus(prepare(config.data))
    folder.refuse_other_vocabulary(corpus)
    return OpenedRun(folder, config, corpus)
