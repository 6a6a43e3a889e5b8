"""Tokens per second of reading with fast weights: many articles at once against one by one.

    python benchmarks/reading_speed.py [--presets awd-lstm awd-qrnn] [--rows 16] [--adapt "*"]
        [--rounds 3] [--device cpu] [--bfloat16] [--articles FOLDER]

The same articles, the same rule (dynamic evaluation, RMS), the same scores (the largest difference
is printed); all ways, and the models of several presets, take turns. Also: the static model.
Weights and tokens are random. Articles are equally long, or (--articles) as long as the test
articles of a prepared corpus; then the longest one is read alone in the end, and the most that "at
once" can gain is what the ceiling says: all segments, over those of the longest article.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from metalm.language.network.model import LanguageModel
from metalm.language.reading.reader import Reader, Readings
from metalm.language.run.presets import preset_named
from metalm.language.text.articles import open_corpus
from metalm.meta.parameters import choose
from metalm.meta.rules.rms_decay import RmsDecay
from metalm.training.allocator import keep_freed_memory

AT_ONCE, ONE_BY_ONE = "fast weights, at once", "fast weights, one by one"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["small"], help="whose models")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="of each article")
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--adapt", nargs="+", default=["*"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--articles", type=Path, help="prepared corpus with test articles")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    print(options)
    lengths = lengths_of(options)
    segments = [math.ceil(length / options.segment) for length in lengths]
    print(f"{len(lengths)} articles; ceiling: {sum(segments) / max(segments):.2f} times")
    ways = {name: ways_of(name, options) for name in options.presets}
    texts = {name: texts_of(name, lengths) for name in options.presets}
    speeds: dict[tuple[str, str], list[float]] = {}
    found: dict[tuple[str, str], Readings] = {}
    for number in range(options.rounds + 1):
        for name in options.presets:
            for way, (reader, rows) in ways[name].items():
                readings = found[name, way] = reader.read(texts[name], rows)
                if number > 0:
                    column = speeds.setdefault((name, way), [])
                    column.append(readings.num_tokens / readings.seconds)
    for name in options.presets:
        print(name)
        for way in ways[name]:
            print(f"  {way:26s} {statistics.median(speeds[name, way]):8.0f} tokens/s")
        pairs = zip(found[name, AT_ONCE].nats, found[name, ONE_BY_ONE].nats, strict=True)
        off = max(float(np.abs(a - b).max()) for a, b in pairs)
        ratio = ratios(speeds[name, AT_ONCE], speeds[name, ONE_BY_ONE])
        print(f"  at once / one by one: {ratio}; largest difference of a score: {off:.1e} nats")
    first, *others = options.presets
    for name in others:
        ratio = ratios(speeds[name, AT_ONCE], speeds[first, AT_ONCE])
        print(f"{name} / {first}, fast weights at once: {ratio}")


def ways_of(preset: str, options: argparse.Namespace) -> dict[str, tuple[Reader, int]]:
    """Readers with a preset's model, and how many articles each reads at once."""
    torch.manual_seed(0)
    model = LanguageModel(preset_named(preset).model).to(options.device)
    model.eval().requires_grad_(False)
    names = choose(model, options.adapt)
    rms = {name: torch.full_like(model.get_parameter(name), 1e-3) for name in names}
    learning = Reader(
        model, RmsDecay(rms, 1e-5, 1e-3, 1e-3), names, options.segment, bfloat16=options.bfloat16
    )
    static = Reader(model, segment=options.segment, bfloat16=options.bfloat16)
    return {
        AT_ONCE: (learning, options.rows),
        ONE_BY_ONE: (learning, 1),
        "static, at once": (static, options.rows),
        "static, one by one": (static, 1),
    }


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Tokens of each article, as many articles as are read at once."""
    if options.articles is None:
        return [options.tokens] * options.rows
    articles = open_corpus(options.articles).test
    return [len(article.tokens) for article in articles][: options.rows]


def texts_of(preset: str, lengths: list[int]) -> list[NDArray[np.int32]]:
    """Articles of random tokens."""
    generator = np.random.default_rng(0)
    vocabulary = preset_named(preset).model.vocabulary_size
    return [generator.integers(0, vocabulary, length, dtype=np.int32) for length in lengths]


def ratios(speeds: list[float], others: list[float]) -> str:
    """Of speeds in the same rounds: median and range."""
    found = [a / b for a, b in zip(speeds, others, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
