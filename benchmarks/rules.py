"""Update rules side by side: kinds x (W_0 frozen or joint) x reading modes x segment lengths.

    python benchmarks/rules.py runs/wikitext-2 runs/gated ... [--out FOLDER] [--modes reset carry]
        [--segments 20 10 5] [--tokens 1000]

Each run is a folder that train.py wrote on the same data, with --rule.kind and as many tokens as
the others; the first one's control is what dynamic evaluation (RMS) reads with, for comparison.
Settings are chosen on the validation articles that tuning uses; what is shown are the other
validation articles, their first `--tokens` tokens, each scored before anything is learnt from it.
No test article is read. A benchmark that was interrupted goes on where it was (cells.json).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.corpora import prepare_as
from metalm.analysis.statistics.bootstrap import ratio_intervals
from metalm.analysis.tables import interval_text
from metalm.language.reading.methods import Learning, Method, ModelName, TrainedModels
from metalm.language.reading.reader import Reader
from metalm.language.run.opened_run import open_run
from metalm.language.text.articles import ArticleSet
from metalm.language.tuning.trials import Trial, choose_settings, trial_from_json, trial_to_json
from metalm.language.tuning.tune import tune
from metalm.language.tuning.tuning_text import TuningConfig, tuning_articles, tuning_text
from metalm.training.allocator import keep_freed_memory

Store = dict[str, Any]


class Cell(NamedTuple):
    """A way of reading, and in which mode."""

    run: str
    learning: Learning
    model: ModelName
    mode: str

    @property
    def key(self) -> str:
        """Its name in the store."""
        return "/".join((self.run, self.learning, self.model, self.mode))


def main() -> None:
    """Tunes, reads and prints, a cell at a time."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cells.json"
    store: Store = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    asked = {"tokens": options.tokens, "segments": options.segments}
    if store.setdefault("asked", asked) != asked:
        sys.exit(f"{path} holds other readings: {store['asked']}; choose another --out")
    for number, name in enumerate(options.runs):
        run = open_run(name, prepare_as)
        tuning = with_segments(run.config.tuning, options.segments, options.tuning_tokens)
        run = run._replace(config=dataclasses.replace(run.config, tuning=tuning))
        models = run.trained()
        for cell in cells_of(Path(name).name, models, options.modes, rivals=number == 0):
            entry = store.setdefault(cell.key, {"kind": run.config.rule.kind})
            for _ in fill(cell, entry, models, run.corpus.valid, tuning, options.tokens):
                keep(path, store)
    for mode in options.modes:
        print_table(store, mode, options.segments, options.reference)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders that train.py wrote")
    parser.add_argument("--out", default="runs/rules", help="where cells.json goes")
    parser.add_argument("--modes", nargs="+", default=["reset", "carry"])
    parser.add_argument("--segments", nargs="+", type=int, default=[20, 10, 5])
    parser.add_argument("--tokens", type=int, default=1000, help="of each article that is shown")
    parser.add_argument("--tuning-tokens", type=int, default=2000, help="of each it is tuned on")
    parser.add_argument(
        "--reference",
        default="/rms/",
        help="what the others are compared with: part of a name in cells.json, such as rates/joint",
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def with_segments(config: TuningConfig, segments: Sequence[int], tokens: int) -> TuningConfig:
    """The same lengths and the same text for every way of learning, and no cache."""
    lengths = tuple(segments)
    return dataclasses.replace(
        config,
        segments=lengths,
        rule_segments=lengths,
        tokens=tokens,
        carry_tokens=tokens,
        thetas=config.thetas[:1],
        shares=config.shares[:1],
    )


def cells_of(
    run: str, models: TrainedModels, modes: Sequence[str], *, rivals: bool
) -> Iterator[Cell]:
    """What a run can show; the static model and dynamic evaluation only where they are asked."""
    for mode in modes:
        if rivals:
            yield Cell(run, "none", "control", mode)
            yield Cell(run, "rms", "control", mode)
        if "rule" in models.rules:
            yield Cell(run, "rule", "control", mode)
        if "joint" in models.rules:
            yield Cell(run, "joint", "joint", mode)


def fill(
    cell: Cell,
    entry: Store,
    models: TrainedModels,
    articles: ArticleSet,
    config: TuningConfig,
    tokens: int,
) -> Iterator[None]:
    """Tunes and reads what the entry of a cell lacks; stops after each reading that is new."""
    if "trials" not in entry:
        text = tuning_text(articles, config, cell.mode)
        trials = tune(models, cell.learning, cell.model, text, config, say)
        entry["trials"] = [trial_to_json(trial) for trial in trials]
        yield
    trials = [trial_from_json(trial) for trial in entry["trials"]]
    others = sorted(set(range(len(articles))) - set(tuning_articles(articles, config)))
    texts = [articles[index].tokens[:tokens] for index in others]
    entry["words"] = [
        int(articles[index].words[len(text) - 1]) + 1
        for index, text in zip(others, texts, strict=True)
    ]
    nats = entry.setdefault("nats", {})
    for segment in sorted({trial.segment for trial in trials}):
        if str(segment) not in nats:
            best = choose_settings(trials, cached=False, segment=segment)
            nats[str(segment)] = read(cell, best, models, texts, config.rows)
            yield


def read(
    cell: Cell,
    trial: Trial,
    models: TrainedModels,
    texts: Sequence[NDArray[np.int32]],
    rows: int,
) -> list[float]:
    """Nats of each text, read with the settings of a trial."""
    method = Method(
        name="",
        model=cell.model,
        learning=cell.learning,
        segment=trial.segment,
        settings=trial.settings,
    )
    reader = Reader(
        models.model(method),
        models.rule(method),
        models.fast_names(method),
        trial.segment,
        surprise=method.surprise,
    )
    if cell.mode == "carry":
        whole = reader.read([np.concatenate(texts)]).nats[0]
        ends = np.cumsum([len(text) for text in texts])[:-1]
        return [float(part.sum()) for part in np.split(whole, ends)]
    return [float(of_text.sum()) for of_text in reader.read(texts, rows).nats]


def say(trial: Trial) -> None:
    """One line a trial."""
    settings = ", ".join(f"{name} {value:.3g}" for name, value in trial.settings.items())
    print(f"segments of {trial.segment}, {settings}: {trial.perplexity:.2f}", file=sys.stderr)


def keep(path: Path, store: Store) -> None:
    """Writes what there is, whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(store) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def print_table(
    store: Mapping[str, Any], mode: str, segments: Sequence[int], reference: str
) -> None:
    """Perplexity per word, and what it is of the reference's at the same segment length."""
    found = {key: value for key, value in store.items() if key.endswith(f"/{mode}")}
    rival = next((key for key in found if reference in key), None)
    if rival is None:
        sys.exit(f"no cell is called {reference!r}; choose a --reference of {', '.join(found)}")
    rivals = found[rival]
    print(f"\n{mode}: perplexity per word, and of that of {rival} (95 %)\n")
    print("| | " + " | ".join(f"segments of {s}" for s in segments) + " |")
    print("|---" * (1 + len(segments)) + "|")
    for key, value in found.items():
        words = np.array(value["words"])
        texts = []
        for segment in segments:
            # What does not learn is the same at every length.
            nats = value["nats"].get(str(segment)) or next(iter(value["nats"].values()))
            perplexity = float(np.exp(np.sum(nats) / words.sum()))
            saved = np.array(nats) - np.array(rivals["nats"][str(segment)])
            ratio = ratio_intervals(saved, words)[0].map(np.exp)
            texts.append(f"{perplexity:.2f}, {interval_text(ratio)}")
        run, learning, *_ = key.split("/")
        print(f"| {title(run, learning, value['kind'])} | " + " | ".join(texts) + " |")


def title(run: str, learning: str, kind: str) -> str:
    """What a row of the table is called."""
    if learning in ("none", "rms"):
        return {"none": "static", "rms": "dynamic evaluation (RMS)"}[learning]
    return f"{kind}, {'W0 frozen' if learning == 'rule' else 'joint'} ({run})"


if __name__ == "__main__":
    main()
