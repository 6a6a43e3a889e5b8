"""Peak extra memory and time of a first-order unroll of K updates, with and without checkpoints.

    python benchmarks/unroll_memory.py [--updates 4 16 64] [--rows 2] [--adapt "*"]

Each measurement is a fresh process: model and fast weights are made, the peak is reset, one unroll
and its backward pass are run, and the peak of the resident memory above the start is printed.
With checkpoints every ceil(sqrt(K)) updates what is kept grows as sqrt(K), for a second pass
through each segment.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.network.segment_loss import SegmentLoss
from metalm.language.text.article_batches import SegmentBatch
from metalm.meta.parameters import choose, split
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.unroll import unroll
from metalm.training.memory import peak_memory, reset_peak_memory


def main() -> None:
    """Runs every measurement in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--adapt", nargs="+", default=["*"])
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one[0], options.one[1], options)
        return
    print("updates K  checkpoint every  extra peak MiB  seconds")
    for updates in options.updates:
        for every in (0, math.ceil(math.sqrt(updates))):
            command = [sys.executable, str(Path(__file__)), "--one", str(updates), str(every)]
            command += ["--rows", str(options.rows), "--segment", str(options.segment)]
            command += ["--adapt", *options.adapt]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            print(found.stdout, end="", flush=True)


def measure(updates: int, every: int, options: argparse.Namespace) -> None:
    """One unroll with its backward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig()).eval()
    slow, rest = split(model, choose(model, options.adapt))
    rms = {name: torch.rand_like(weight) * 1e-3 + 1e-4 for name, weight in slow.items()}
    rule = LearnedRates(rms, rate=1e-4, decay=1e-3)
    shape = (options.segment, options.rows)
    batches = [
        SegmentBatch(
            torch.randint(0, 6000, shape), torch.randint(0, 6000, shape), torch.ones(shape)
        )
        for _ in range(updates)
    ]
    fast = {
        name: weight.detach().expand(options.rows, *weight.shape).clone()
        for name, weight in slow.items()
    }
    for parameter in (*model.parameters(), *rule.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    loss = SegmentLoss(model, options.segment)
    reset_peak_memory()
    before = peak_memory()
    start = time.perf_counter()
    unrolled = unroll(
        loss,
        rule,
        slow,
        rest,
        batches,
        model.initial_state(options.rows),
        fast=fast,
        truncate=True,
        segment=every or None,
    )
    unrolled.meta_loss.backward()
    seconds = time.perf_counter() - start
    after = peak_memory()
    if before is None or after is None:
        raise SystemExit("this system does not tell the peak memory of a process (Linux does)")
    print(f"{updates:9d}  {every or '-':>16}  {(after - before) / 2**20:14.0f}  {seconds:7.1f}")


if __name__ == "__main__":
    main()
