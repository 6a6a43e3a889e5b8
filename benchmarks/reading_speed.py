"""Tokens per second of reading with fast weights: many articles at once against one by one.

    python benchmarks/reading_speed.py [--rows 16] [--adapt "*"] [--rounds 3] [--device cpu]

The same articles, the same rule, the same scores (the largest difference is printed); the two ways
take turns. Also: the static model.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch

from metalm.language.model import LanguageModel, ModelConfig
from metalm.language.reading import Reader, Readings
from metalm.meta.parameters import choose
from metalm.meta.rules.gradient_descent import GradientDescent
from metalm.training.allocator import keep_freed_memory


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="of each article")
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--adapt", nargs="+", default=["*"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig()).to(options.device).eval().requires_grad_(False)
    generator = np.random.default_rng(0)
    texts = [
        generator.integers(0, 6000, options.tokens, dtype=np.int32) for _ in range(options.rows)
    ]
    names = choose(model, options.adapt)
    learning = Reader(model, GradientDescent(0.1, 1e-3), names, options.segment)
    ways = {
        f"fast weights, {options.rows} at once": (learning, options.rows),
        "fast weights, one by one": (learning, 1),
        f"static, {options.rows} at once": (Reader(model, segment=options.segment), options.rows),
        "static, one by one": (Reader(model, segment=options.segment), 1),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    readings: dict[str, Readings] = {}
    for number in range(options.rounds + 1):
        for name, (reader, rows) in ways.items():
            readings[name] = reader.read(texts, rows)
            if number > 0:
                speeds[name].append(readings[name].num_tokens / readings[name].seconds)
    print(options)
    for name, found in speeds.items():
        print(f"{name:32s} {statistics.median(found):8.0f} tokens/s")
    at_once, one_by_one = list(readings.values())[:2]
    ratios = [a / b for a, b in zip(*list(speeds.values())[:2], strict=True)]
    difference = max(
        float(np.abs(a - b).max()) for a, b in zip(at_once.nats, one_by_one.nats, strict=True)
    )
    print(
        f"at once / one by one: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); largest difference of a score: {difference:.1e} nats"
    )


if __name__ == "__main__":
    main()
