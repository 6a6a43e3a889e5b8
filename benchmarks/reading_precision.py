"""Reading with matrix products in bfloat16 against float32: perplexity, and tokens per second.

    python benchmarks/reading_precision.py RUN [--articles 24] [--tokens 1500] [--rows 12]
        [--segment 10] [--carry-articles 6] [--carry-tokens 1000]

Validation articles of a trained run, their beginnings, read with the settings that tuning found
best, in float32, at this segment length. In `reset` the articles are read in batches of so many
rows, each batch in one precision right after the other, so that what else the machine does falls on
both; in `carry` the beginnings are one text. Speeds are tokens per second of processor time (of one
thread), which other programs disturb less than the clock on the wall. Nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.corpora import prepare_as
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.copy_readings import Request, read_copies
from metalm.language.reading.methods import NAMES, Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Readings
from metalm.language.run.opened_run import OpenedRun, open_run
from metalm.language.run.trial_files import read_trials
from metalm.language.tuning.comparison import TUNED
from metalm.language.tuning.trials import choose_settings
from metalm.training.allocator import keep_freed_memory

LEARNING = ("none", "rms", "rms-flush", "joint", "joint-flush")
PRECISIONS = (False, True)
"""Whether products are in bfloat16."""


class Text(NamedTuple):
    """The beginning of an article."""

    tokens: NDArray[np.int32]
    num_words: int


class Both(NamedTuple):
    """A text, or several, read by one method in both precisions."""

    float32: Readings
    bfloat16: Readings

    def speeds(self) -> tuple[float, float]:
        """Tokens per second of each."""
        first, second = (each.num_tokens / each.seconds for each in self)
        return first, second


def main() -> None:
    """Opens the run, reads, and prints a table a mode."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    run = open_run(options.run, prepare_as)
    models = run.trained()
    print(options)
    texts = beginnings(run, options.articles, options.tokens)
    methods = compared(run, "reset", options.segment)
    warm_up(models, methods, texts)
    reset: dict[str, list[Both]] = {method.name: [] for method in methods}
    for start in range(0, len(texts), options.rows):
        batch = texts[start : start + options.rows]
        for name, both in read(models, methods, batch, options.rows, start).items():
            reset[name].append(both)
            say(f"reset, from article {start}: {name}, {speeds_text([both])}")
    print(table("reset", methods, reset, [text.num_words for text in texts]))
    if options.carry_articles:
        several = beginnings(run, options.carry_articles, options.carry_tokens)
        stream = Text(
            np.concatenate([text.tokens for text in several]),
            sum(text.num_words for text in several),
        )
        methods = compared(run, "carry", options.segment)
        carry = read(models, methods, [stream], options.rows, 0)
        print(table("carry", methods, {n: [b] for n, b in carry.items()}, [stream.num_words]))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("--articles", type=int, default=24, help="validation articles (reset)")
    parser.add_argument("--tokens", type=int, default=1500, help="of each, from its start")
    parser.add_argument("--carry-articles", type=int, default=6, help="of the one text (carry)")
    parser.add_argument("--carry-tokens", type=int, default=1000, help="of each of them")
    parser.add_argument("--segment", type=int, default=10, help="tokens between two updates")
    parser.add_argument("--rows", type=int, default=12, help="articles read at once")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def beginnings(run: OpenedRun, articles: int, tokens: int) -> list[Text]:
    """Of validation articles spread evenly over the split."""
    count = min(articles, len(run.corpus.valid))
    places = np.linspace(0, len(run.corpus.valid) - 1, count).round().astype(int).tolist()
    found = []
    for place in places:
        article = run.corpus.valid[place]
        words = len(np.unique(article.words[:tokens]))
        found.append(Text(article.tokens[:tokens], words))
    return found


def compared(run: OpenedRun, mode: str, segment: int) -> list[Method]:
    """Each way of learning without and with a cache; the static model at its own segments."""
    trials = read_trials(run.folder, mode)
    methods = []
    for name, learning, model in TUNED:
        if learning not in LEARNING or not trials.get(name):
            continue
        for cached in (False, True):
            length = None if learning == "none" else segment
            best = choose_settings(trials[name], cached=cached, segment=length)
            methods.append(
                Method(
                    name=NAMES[learning] + (" + cache" if cached else ""),
                    model=model,
                    learning=learning,
                    segment=best.segment,
                    settings=best.settings,
                    cache=best.cache if cached else None,
                )
            )
    return methods


def warm_up(models: TrainedModels, methods: Sequence[Method], texts: Sequence[Text]) -> None:
    """What is compiled or allocated once."""
    few = [Text(text.tokens[:30], 1) for text in texts[:2]]
    read(models, methods, few, len(few), 0)


def read(
    models: TrainedModels, methods: Sequence[Method], texts: Sequence[Text], rows: int, turn: int
) -> dict[str, Both]:
    """Every method in both precisions; which comes first changes from turn to turn.

    Several texts are read by each method alone, with the cache that it needs, so that its time is
    its own; a single one by several side by side, all with the same caches.
    """
    shared = grid_of([m.cache for m in methods])
    requests = [
        Request(method, shared if len(texts) == 1 else grid_of([method.cache]))
        for method in methods
    ]
    tokens = [text.tokens for text in texts]
    order = PRECISIONS if turn // rows % 2 == 0 else PRECISIONS[::-1]
    found: dict[int, dict[bool, Readings]] = {place: {} for place in range(len(methods))}
    together = [list(range(len(methods)))] if len(texts) == 1 else [[n] for n in found]
    for group in together:
        asked = [requests[place] for place in group]
        for bfloat16 in order:
            before = time.process_time()
            for places, several in read_copies(models, asked, tokens, rows, bfloat16=bfloat16):
                for place, readings in zip(places, several, strict=True):
                    readings.seconds = (time.process_time() - before) / len(places)
                    found[group[place]][bfloat16] = readings
                before = time.process_time()
    return {
        method.name: Both(found[place][False], found[place][True])
        for place, method in enumerate(methods)
    }


def grid_of(caches: Sequence[CacheConfig | None]) -> CacheGrid | None:
    """What serves these caches; None for none."""
    known = [cache for cache in caches if cache is not None]
    if not known:
        return None
    thetas = tuple(sorted({cache.theta for cache in known}))
    return CacheGrid(thetas=thetas, window=known[0].window)


def table(
    mode: str, methods: Sequence[Method], read: Mapping[str, Sequence[Both]], words: Sequence[int]
) -> str:
    """A line a method."""
    lines = [
        f"| {mode} (segments) | float32 | bfloat16 | of float32 | per article | one token, nats "
        "| fallbacks | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shared = grid_of([m.cache for m in methods])
    for method in methods:
        parts = read[method.name]
        grid = shared if len(words) == 1 else grid_of([method.cache])
        nats = [
            texts_of(method, [getattr(both, name) for both in parts], grid) for name in Both._fields
        ]
        sums = np.array([[text.sum() for text in of_precision] for of_precision in nats])
        ratios = np.exp((sums[1] - sums[0]) / words)
        exact, low = np.exp(sums.sum(1) / sum(words))
        most = max(np.abs(a - b).max() for a, b in zip(*nats, strict=True))
        falls = [sum(sum(getattr(b, name).fallbacks) for b in parts) for name in Both._fields]
        lines.append(
            f"| {method.name} ({method.segment}) | {exact:.3f} | {low:.3f} | {low / exact:.5f} | "
            f"{ratios.min():.4f} to {ratios.max():.4f} | {most:.2f} | {falls[0]}, {falls[1]} | "
            f"{speeds_text(parts)} |"
        )
    return "\n".join(lines)


def texts_of(
    method: Method, readings: Sequence[Readings], grid: CacheGrid | None
) -> list[NDArray[np.float64]]:
    """The losses of each text, with the method's cache."""
    place, share = None, 0.0
    if method.cache is not None and grid is not None:
        place, share = grid.thetas.index(method.cache.theta), method.cache.share
    return [nats for each in readings for nats in nats_of_copies([each], place, share)]


def speeds_text(parts: Sequence[Both]) -> str:
    """Tokens per second: median of each; and of their ratio in the same turn, with its range."""
    speeds = np.array([both.speeds() for both in parts])
    ratios = speeds[:, 1] / speeds[:, 0]
    medians = [statistics.median(column) for column in speeds.T.tolist()]
    spread = f" ({ratios.min():.2f} to {ratios.max():.2f})" if len(parts) > 1 else ""
    return f"{medians[0]:.0f}, {medians[1]:.0f}: {np.median(ratios):.2f}{spread}"


def say(words: str) -> None:
    """How far it is, beside the tables."""
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
