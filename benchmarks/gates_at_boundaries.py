"""Does a gated rule that reads on across articles find where one ends? Its gates along A, B, C ...

    python benchmarks/gates_at_boundaries.py runs/gated [--learning joint] [--articles 12]
        [--tokens 1000] [--early 100] [--out FOLDER]

The first `--tokens` tokens of validation articles are read as one stream, with the rule as it was
trained (its scales at 1); nothing tells it where an article ends. Printed: the means over all
tensors of the update and the flush gate in the first `--early` tokens of an article, and later, and
their difference, with intervals from a bootstrap over articles. The first article, which begins
from W_0, does not count. Written: gates.png and gates.svg, along the first eight articles.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import matplotlib
import numpy as np
import torch

from data_prep.corpora import prepare_as
from metalm.analysis.figures.appearance import COLOURS, SETTINGS, new_figure, save_figure
from metalm.analysis.statistics.bootstrap import ratio_intervals
from metalm.analysis.statistics.scores import FloatArray
from metalm.analysis.tables import interval_text
from metalm.language.reading.curves import (
    FLUSH,
    UPDATE,
    CurveRecorder,
    Curves,
    along_articles,
)
from metalm.language.reading.methods import Method
from metalm.language.reading.reader import Reader
from metalm.language.run.opened_run import open_run
from metalm.training.allocator import keep_freed_memory

SHOWN = 8


def main() -> None:
    """Reads, prints and draws."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    run = open_run(options.run, prepare_as)
    models = run.trained()
    method = Method(
        name="",
        model="control" if options.learning == "rule" else "joint",
        learning=options.learning,
        segment=options.segment,
    )
    texts = [run.corpus.valid[n].tokens[: options.tokens] for n in range(options.articles)]
    rule = models.rule(method)
    assert rule is not None
    reader = Reader(models.model(method), rule, models.fast_names(method), method.segment)
    recorder = CurveRecorder(reader.slow, rule, 1)
    readings = reader.read([np.concatenate(texts)], recorder=recorder)
    lengths = [len(text) for text in texts]
    found = {
        curves.quantity: along_articles(curves, lengths)
        for curves in readings.curves
        if curves.quantity in (UPDATE, FLUSH)
    }
    if not found:
        raise SystemExit(f"the rule of {options.run} has no gates; expected --rule.kind gated")
    print(f"{options}: {readings.total / sum(lengths):.4f} nats a token")
    for quantity, curves in found.items():
        print(f"{quantity}: {early_and_late(curves, options.early)}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(found, lengths[:SHOWN], out / "gates")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a folder that train.py wrote with --rule.kind gated")
    parser.add_argument("--learning", choices=["rule", "joint"], default="joint")
    parser.add_argument("--articles", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1000, help="of each article")
    parser.add_argument("--early", type=int, default=100, help="tokens that count as its beginning")
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/gates")
    return parser.parse_args()


def early_and_late(curves: Curves, early: int) -> str:
    """Means of a gate at the beginning of articles and later, and what the first has more."""
    means = [values.mean(1) for values in curves.values[1:]]
    starts = [places <= early for places in curves.places[1:]]
    first = np.array([mean[start].mean() for mean, start in zip(means, starts, strict=True)])
    later = np.array([mean[~start].mean() for mean, start in zip(means, starts, strict=True)])
    intervals = ratio_intervals(np.stack((first, later, first - later)), np.ones(len(first)))
    texts = [interval_text(interval) for interval in intervals]
    return f"early {texts[0]}, later {texts[1]}, early less later {texts[2]}"


def draw(found: dict[str, Curves], lengths: Sequence[int], stem: Path) -> None:
    """One panel a gate: its mean over the tensors along the articles, with their boundaries."""
    starts = np.cumsum([0, *lengths])
    with matplotlib.rc_context(SETTINGS):
        figure = new_figure(9.0, 4.6)
        axes = figure.subplots(len(found), 1, sharex=True)
        for axis, (quantity, curves) in zip(axes, found.items(), strict=True):
            for start, places, values in zip(starts, curves.places, curves.values, strict=False):
                axis.plot(start + places, _smooth(values.mean(1)), color=COLOURS[0], linewidth=1.2)
            for boundary in starts:
                axis.axvline(boundary, color="#888888", linewidth=0.8, linestyle=":")
            axis.set_ylabel(f"mean {quantity} gate")
        for letter, start, length in zip(ascii_uppercase, starts, lengths, strict=False):
            axes[0].annotate(
                letter,
                (start + length / 2, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
            )
        axes[-1].set_xlabel("tokens read, articles laid end to end")
        save_figure(figure, stem)


def _smooth(values: FloatArray) -> FloatArray:
    """Means of three neighbours, of one article."""
    padded = np.concatenate((values[:1], values, values[-1:]))
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


if __name__ == "__main__":
    main()
