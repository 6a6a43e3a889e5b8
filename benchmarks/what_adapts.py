"""Which weights adapt: perplexity against memory per article and speed, under dynamic evaluation.

    python benchmarks/what_adapts.py RUN [--out FOLDER] [--articles 20] [--tokens 2000]
        [--segment 20] [--ranks 4 16 64] [--bases random principal] [--factors both left]
        [--learning sgd rms]

Validation articles of a trained run, each read for itself (reset) with the control's weights. Tried
are whole tensors, and low-rank changes of those that adapt by default (W_0 + U V; biases whole).
Each choice has a rate of its own, found by a walk on some validation articles; shown are others.
Decay and eps are those that tuning chose for the default at this segment length, or those where the
search for them begins.

The RMS that the rate is divided by is counted on training text for every choice. At W_0 U is zero,
so that V has no gradient there: in place of its RMS stands the mean of that of its U. A benchmark
that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.corpora import prepare_as
from metalm.adapt.reading_state import checksum
from metalm.analysis.statistics.bootstrap import ratio_intervals
from metalm.analysis.tables import interval_text
from metalm.language.network.model import LanguageModel
from metalm.language.run.opened_run import OpenedRun, open_run
from metalm.language.run.trained import load_model
from metalm.language.run.trial_files import read_trials
from metalm.language.tuning.choice_scores import (
    ChoiceScore,
    choice_score,
    compared_text,
    starting_settings,
    static_score,
)
from metalm.language.tuning.fast_choices import (
    WHOLE,
    FastChoice,
    FastModel,
    fast_rms,
    low_rank_choices,
)
from metalm.training.allocator import keep_freed_memory

DEFAULT = next(choice.name for choice in WHOLE if choice.patterns == FastChoice(name="").patterns)


def main() -> None:
    """Opens the run, measures what is missing, and prints a table."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    print(table(measure(open_run(options.run, prepare_as), options)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("--out", help="default: what-adapts/ in the run's folder")
    parser.add_argument("--articles", type=int, default=20, help="validation articles shown")
    parser.add_argument("--tuning-articles", type=int, default=5, help="others, for the rates")
    parser.add_argument("--tokens", type=int, default=2000, help="of each, from its start")
    parser.add_argument("--segment", type=int, default=20, help="tokens between two updates")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--bases", nargs="+", default=["random", "principal"])
    parser.add_argument("--factors", nargs="+", default=["both"], help="fast ones; left: U alone")
    parser.add_argument("--learning", nargs="+", default=["sgd", "rms"], choices=("sgd", "rms"))
    parser.add_argument("--halvings", type=int, default=1, help="of the walk's step, a factor of 2")
    parser.add_argument("--batches", type=int, default=60, help="of training text, for the RMS")
    parser.add_argument("--rows", type=int, default=5, help="articles read at once")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def measure(run: OpenedRun, options: argparse.Namespace) -> list[ChoiceScore]:
    """One score a choice and way of learning, and one static; what is there already stays."""
    folder = run.folder
    model = load_model(folder, "control", run.config)
    training = run.base_articles
    text = compared_text(
        run.corpus.valid,
        num_tuned=options.tuning_articles,
        num_shown=options.articles,
        tokens=options.tokens,
    )
    path = Path(options.out or folder.folder / "what-adapts") / "what-adapts.json"
    content = begin(path, model, options)
    scores = [ChoiceScore(**score) for score in content["scores"]]
    done = {(score.choice, score.learning) for score in scores}

    def add(score: ChoiceScore) -> None:
        scores.append(score)
        content["scores"].append(dataclasses.asdict(score))
        keep(path, content)
        said = f"{score.choice}, {score.learning}: perplexity {score.perplexity:.2f}"
        print(said, file=sys.stderr, flush=True)

    if ("nothing", "none") not in done:
        add(static_score(FastModel(model, (), 0, 0), text, options.rows))
    tuned, segment = read_trials(folder, "reset"), options.segment
    low_rank = low_rank_choices(options.ranks, options.bases, options.factors)
    for choice in (*WHOLE, *low_rank):
        wanted = [way for way in options.learning if (choice.name, way) not in done]
        if not wanted:
            continue
        fast = choice.of(model)
        rms = fast_rms(fast, training, segment, options.batches) if "rms" in wanted else {}
        for learning in wanted:
            start = starting_settings(tuned.get(learning, []), learning, segment)
            asked = (choice.name, learning, fast, rms, start, segment, text)
            add(choice_score(*asked, rows=options.rows, halvings=options.halvings))
    return scores


def begin(path: Path, model: LanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured so far of the same model in the same way, or nothing."""
    free = (
        "run",
        "out",
        "threads",
        "ranks",
        "bases",
        "factors",
        "learning",
    )  # more choices may be added
    asked = {name: value for name, value in vars(options).items() if name not in free}
    fresh = {"options": asked, "model": checksum(model), "scores": []}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(found.get(name) == fresh[name] for name in ("options", "model"))
    return found if same else fresh


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Writes what there is, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(scores: Sequence[ChoiceScore]) -> str:
    """One line a score, in Markdown."""
    lines = [
        "| fast weights | rule | rate | perplexity per word | of the default's (95 %) "
        "| kept per article | while it learns | tokens/s |",
        "|---" * 8 + "|",
    ]
    for score in scores:
        cells = [
            score.choice,
            {"none": "static", "sgd": "SGD", "rms": "RMS"}[score.learning],
            f"{score.settings['rate']:.3g}" if score.settings else "",
            f"{score.perplexity:.2f}",
            against_default(score, scores),
            *(f"{size / 1e6:,.3f} MB" for size in (score.bytes_kept, score.bytes_at_work)),
            f"{score.tokens_per_second:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_default(score: ChoiceScore, scores: Sequence[ChoiceScore]) -> str:
    """Perplexity over that of what adapts by default, by the same rule (static: by the first)."""
    for other in scores:
        if other.choice == DEFAULT and score.learning in ("none", other.learning):
            saved = np.array(score.nats) - np.array(other.nats)
            return interval_text(ratio_intervals(saved, score.words)[0].map(np.exp))
    return ""


if __name__ == "__main__":
    main()
