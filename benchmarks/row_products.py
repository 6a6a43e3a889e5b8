"""Float32 products with weights per row: torch's own choice of library against the quick one.

    python benchmarks/row_products.py [--rows 12] [--segments 20 10 5] [--rounds 15] [--threads 1]

The three large products of a segment (logits, their gradient to the features, and to the weight) of
a vocabulary of 6,000 and 256 features; medians in milliseconds, the two ways taking turns, and the
relative error of each against float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from metalm.training.allocator import keep_freed_memory
from metalm.training.precision import quickest_float32


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--segments", type=int, nargs="+", default=[20, 10, 5])
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight = torch.randn(options.rows, options.vocabulary, options.size)
    print(options)
    for segment in options.segments:
        features = torch.randn(options.rows, segment, options.size)
        to_logits = torch.randn(options.rows, segment, options.vocabulary)
        products = {
            "logits": (features, weight.mT),
            "to features": (to_logits, weight),
            "to weight": (to_logits.mT, features),
        }
        for name, (left, right) in products.items():
            compare(f"segments of {segment}, {name}", left, right, options.rounds)


def compare(title: str, left: torch.Tensor, right: torch.Tensor, rounds: int) -> None:
    """Both ways in turns; prints one line."""
    ways: tuple[Callable[[], AbstractContextManager[None]], ...] = (
        nullcontext,
        lambda: quickest_float32(left),
    )
    exact = left.double() @ right.double()
    times: tuple[list[float], list[float]] = ([], [])
    errors = [0.0, 0.0]
    for number in range(rounds + 3):
        for way, context in enumerate(ways):
            start = time.perf_counter()
            with context():
                found = left @ right
            if number >= 3:  # the first rounds warm up
                times[way].append(time.perf_counter() - start)
            errors[way] = float((found - exact).norm() / exact.norm())
    own, quick = (statistics.median(column) * 1e3 for column in times)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    print(
        f"{title:28s} {own:7.2f} ms, quick {quick:7.2f} ms, ratio {ratio:.2f}; "
        f"errors {errors[0]:.1e}, {errors[1]:.1e}"
    )


if __name__ == "__main__":
    main()
