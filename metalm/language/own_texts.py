"""Any texts, read by a trained model: static against metalm, and the rivals that were tuned.

The model is that of a run, or one that `Pretrained.save_pretrained` saved. Each text is read for
itself (mode "reset"), with the settings that validation chose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from metalm.analysis.report import write_page
from metalm.analysis.statistics.scores import Scores
from metalm.analysis.tables import Cost, print_tables
from metalm.language.pretrained import Pretrained, ReadingMode
from metalm.language.reading.method_readings import described
from metalm.language.reading.methods import NAMES, Method, TrainedModels
from metalm.language.reading.progress import ReadingProgress
from metalm.language.reading.store import ReadingStore
from metalm.language.run.mixtures import Mixtures, kept_mixtures
from metalm.language.run.opened_run import read_experiment
from metalm.language.run.presets import ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import score_split
from metalm.language.run.trained import load_trained
from metalm.language.run.trial_files import read_trials, weights_of
from metalm.language.text.articles import SCHEMA, ArticleSet
from metalm.language.text.vocabulary import Vocabulary
from metalm.language.tuning.comparison import compared_methods
from metalm.training.devices import use_device
from metalm.training.precision import refuse_emulated_bfloat16

MODE: ReadingMode = "reset"

_NOT_LEARNING = (
    "Here, static is the same model without learning. Its weights were trained for learning while "
    "they read, so that without it they are worse than those of a model trained ordinarily."
)


class TextReader(NamedTuple):
    """What reads the texts."""

    vocabulary: Vocabulary
    """Text to tokens."""
    models: TrainedModels
    """Trained weights and rules."""
    methods: Sequence[Method]
    """What is compared; the first is the static model."""
    mixtures: Mixtures
    """The networks of those that have one."""
    rows: int
    """Texts read at once."""
    configuration: Mapping[str, Any]
    """What the report shows."""
    bfloat16: bool = False
    """Whether it reads with matrix products in bfloat16."""
    corpus: str = ""
    """Name of what it was trained on."""
    notes: tuple[str, ...] = ()
    """What the page says about it."""


def reader_of_run(
    folder: LanguageRunFolder, device: str | None = None, bfloat16: bool | None = None
) -> TextReader:
    """Every method of a run that can read without its training data.

    Args:
        folder: of the run.
        device: where tensors live; None for where the run was trained.
        bfloat16: whether it reads with products in bfloat16; None for what the run's evaluation
            does.

    Raises:
        ValueError: the run has no trained model, a file is damaged, or there is no such device, or
            no bfloat16 on it.
    """
    config = read_experiment(folder)
    config = dataclasses.replace(config, device=device or config.device)
    if bfloat16 is not None:
        config = dataclasses.replace(
            config, evaluation=dataclasses.replace(config.evaluation, bfloat16=bfloat16)
        )
    use_device(config.device)
    if config.evaluation.bfloat16:
        refuse_emulated_bfloat16(config.device)
    counted = [s for s in config.tuning.segments if folder.has(f"statistics-{s}")]
    models = load_trained(folder, config, None, segments=counted)
    mixtures, mixed = kept_mixtures(folder, MODE, weights_of(models)) or ({}, {})
    methods = [
        method
        for method in compared_methods(
            read_trials(folder, MODE, weights_of(models)),
            ablations=False,
            learned_cache=config.tuning.learned_cache,
            one_model=config.joint.tokens == 0,
        )
        if method.model in models.models
        and (method.learning != "rms" or method.segment in models.statistics)
        and (not method.learned_mixture or mixed.get(method.name) == described(method))
    ]
    return TextReader(
        Vocabulary.load(folder.vocabulary_path),
        models,
        methods or untuned_methods(models, config),
        mixtures,
        config.evaluation.rows,
        dataclasses.asdict(config),
        config.evaluation.bfloat16,
        Path(config.data.source).name,
    )


def untuned_methods(models: TrainedModels, config: ExperimentConfig) -> list[Method]:
    """The static model, and metalm if it is trained, at the settings it was trained with."""
    methods = [Method(name=NAMES["none"], model="control", learning="none", segment=64)]
    if "joint" in models.models:
        methods.append(
            Method(
                name=NAMES["joint"],
                model="joint",
                learning="joint",
                segment=config.joint.segment,
                settings=models.start("joint"),
            )
        )
    return methods


def reader_of_pretrained(
    source: str | Path, device: str | None = None, bfloat16: bool = False
) -> TextReader:
    """A saved model, static and learning.

    Args:
        source: a folder, or "shipped" for the model that comes with the package.
        device: where tensors live; None for the processor.
        bfloat16: whether it reads with products in bfloat16.

    Raises:
        ValueError: nothing is there, a file is damaged, or there is no such device, or no bfloat16
            on it.
    """
    device = device or "cpu"
    use_device(device)
    if bfloat16:
        refuse_emulated_bfloat16(device)
    saved = Pretrained.from_pretrained(source, device=device)
    return TextReader(
        saved.vocabulary,
        saved.trained_models(),
        saved.methods(MODE),
        {},
        1,
        dataclasses.asdict(saved.config),
        bfloat16,
        saved.config.origin.corpus,
        (_NOT_LEARNING,),
    )


def evaluate_texts(
    reader: TextReader,
    texts: Sequence[tuple[str, str]],
    folder: Path,
    *,
    command: str,
    notes: Sequence[str] = (),
) -> Path:
    """Scores texts, prints the tables and writes the page.

    Args:
        reader: what reads them.
        texts: title and text of each, with at least one word.
        folder: where report.html, results.json and the finished readings go.
        command: what the page says made it.
        notes: what else it says, beside the reader's own notes.

    Returns:
        The path of report.html.
    """
    articles = articles_of(texts, reader.vocabulary)
    store = ReadingStore(folder / "readings")
    with ReadingProgress("reading") as progress:
        found = score_split(
            reader.models,
            reader.methods,
            articles,
            MODE,
            store,
            reader.rows,
            progress,
            reader.mixtures,
            reader.vocabulary.unknown,
            bfloat16=reader.bfloat16,
        )
    scores: dict[str, Scores] = {MODE: found.scores}
    cost: dict[str, Cost] = {}
    if any(found.fallbacks.values()):
        cost[MODE] = {name: {"fallbacks": times} for name, times in found.fallbacks.items()}
    print_tables(scores, cost)
    names = ", ".join(title for title, _ in texts)
    return write_page(
        scores,
        folder,
        configuration=reader.configuration,
        cost=cost,
        command=command,
        traces={MODE: found.traces},
        title=f"own text: {names}" + (", products in bfloat16" if reader.bfloat16 else ""),
        notes=[*notes, *reader.notes],
    )


def articles_of(texts: Sequence[tuple[str, str]], vocabulary: Vocabulary) -> ArticleSet:
    """Texts as articles in memory, in the form in which corpora are kept on disk."""
    rows = [
        {
            "title": title,
            "text": text,
            "tokens": encoded.tokens,
            "words": encoded.words,
            "num_words": int(encoded.words[-1]) + 1,
        }
        for (title, text), encoded in zip(
            texts, vocabulary.encode_batch([text for _, text in texts]), strict=True
        )
    ]
    return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))
