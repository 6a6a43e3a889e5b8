"""Time and peak memory of each way to take the meta-gradient, against the number of updates K.

    python benchmarks/meta_gradients.py [--updates 8 32] [--rows 4] [--adapt "*"]
    python benchmarks/meta_gradients.py --updates 200 --ways truncated forward

Each measurement is a fresh process: model and fast weights are made, one update is run to warm up,
the peak is reset, K updates and their backward pass are run; printed are the peak of the resident
memory above the start and the processor's seconds (one thread), each also as a share of the first
line's. `truncated` and `forward` read the K updates in unrolls of `--piece`, each with a backward
pass of its own: the first forgets what was before, the second carries it in traces. Checkpoints are
kept as `segment="least"` chooses, or every `--every` updates.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.network.segment_loss import SegmentLoss
from metalm.language.text.article_batches import SegmentBatch
from metalm.meta.forward_mode import initial_traces
from metalm.meta.parameters import choose, split
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.segment_length import Segment
from metalm.meta.unroll import unroll
from metalm.training.memory import peak_memory, reset_peak_memory

WAYS = (
    "first order",
    "first order, checkpoints",
    "second order",
    "second order, checkpoints",
    "truncated",
    "forward",
)


def main() -> None:
    """Runs every measurement in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--piece", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--adapt", nargs="+", default=["embedding.*", "*input_weight", "*bias"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one[0], int(options.one[1]), options)
        return
    print("updates K  way                        extra peak MiB         seconds")
    for updates in options.updates:
        first: list[float] = []
        for way in options.ways:
            command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--one", way]
            found = subprocess.run(
                [*command, str(updates)], stdout=subprocess.PIPE, text=True, check=True
            )
            numbers = [float(number) for number in found.stdout.split()]
            first = first or numbers
            (peak, of_peak), (seconds, of_seconds) = (
                (number, number / base) for number, base in zip(numbers, first, strict=True)
            )
            print(
                f"{updates:9d}  {way:25}  {peak:7.1f} ({of_peak:5.2f})  "
                f"{seconds:7.2f} ({of_seconds:5.2f})",
                flush=True,
            )


def measure(way: str, updates: int, options: argparse.Namespace) -> None:
    """Prints the MiB and the seconds of one way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary_size=options.vocabulary,
        embedding_size=options.embedding,
        hidden_size=options.hidden,
    )
    run = prepare(LanguageModel(config).eval(), way, options)
    run(1)
    reset_peak_memory()
    before, start = peak_memory(), time.process_time()
    run(updates)
    seconds, after = time.process_time() - start, peak_memory()
    if before is None or after is None:
        raise SystemExit("this system does not tell the peak memory of a process (Linux does)")
    print((after - before) / 2**20, seconds)


def prepare(model: LanguageModel, way: str, options: argparse.Namespace) -> Callable[[int], None]:
    """What reads so many updates from W_0 on, and takes the meta-gradient."""
    slow, rest = split(model, choose(model, options.adapt))
    rms = {name: torch.rand_like(weight) * 1e-3 + 1e-4 for name, weight in slow.items()}
    rule = LearnedRates(rms, rate=1e-4, decay=1e-3)
    loss = SegmentLoss(model, options.segment)
    shape = (options.segment, options.rows)
    for parameter in (*model.parameters(), *rule.parameters()):
        parameter.grad = torch.zeros_like(parameter)

    def batch() -> SegmentBatch:
        inputs, targets = torch.randint(0, model.config.vocabulary_size, (2, *shape))
        return SegmentBatch(inputs, targets, torch.ones(shape))

    def run(updates: int) -> None:
        in_pieces, forward = way in ("truncated", "forward"), way == "forward"
        piece = options.piece if in_pieces else updates
        segment: Segment = options.every or "least"
        state = model.initial_state(options.rows)
        fast = {
            name: weight.detach().expand(options.rows, *weight.shape).clone()
            for name, weight in slow.items()
        }
        traces = initial_traces(rule, fast) if forward else None
        for begun in range(0, updates, piece):
            unrolled = unroll(
                loss,
                rule,
                slow,
                rest,
                [batch() for _ in range(min(piece, updates - begun))],
                state,
                fast=fast,
                truncate=True,
                order=2 if way.startswith("second") else 1,
                mode="forward" if forward else "reverse",
                traces=traces,
                overwrite=forward,
                segment=segment if way.endswith("checkpoints") else None,
            ).cut()
            unrolled.meta_loss.backward()
            fast, state, traces = unrolled.fast, unrolled.state, unrolled.traces

    return run


if __name__ == "__main__":
    main()
