"""A segment of the recurrence with weights per row, forth and back: loops against compiled walks.

    python benchmarks/recurrence.py [--device cuda] [--rows 60] [--hidden 1150] [--segment 20]
        [--rounds 20] [--profile] [--shared]

Input weights and biases are each row's own; so are the recurrent weights, or (--shared) the rows
share them, as they do where all but the recurrent weights adapt, which is the default of every way
to learn.

Ways that take turns: loops that fill their results in place, the pure functions of
`compiled_walks.py` as they stand, and the same compiled; on a GPU also its own kernels
(`gpu_walks.py`), and the loops as a CUDA graph, whose inputs never move. Medians and ratios are
printed, and the largest difference of a result from the loops'. `--profile` shows what the time of
each goes to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from metalm.language.network import compiled_walks, row_walks
from metalm.language.network.row_recurrence import RowLSTM
from metalm.training.compiling import OftenCalled

PIECES = ("read_piece", "back_piece", "change_piece")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--shared", action="store_true", help="one recurrent weight for all rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(options)
    device = torch.device(options.device)
    run = segment(options.rows, options.hidden, options.segment, device, options.shared)
    on_gpu = device.type == "cuda"
    ways = {name: (way, run) for name, way in (ON_GPU if on_gpu else WAYS).items()}
    if on_gpu:
        try:
            ways[GRAPH] = nullcontext, graph_of(run)
        except RuntimeError as error:
            print(f"no graph: {error}")
    times: dict[str, list[float]] = {}
    expected: list[Tensor] = []
    for number in range(options.rounds + 1):
        for name, (way, function) in ways.items():
            with way():
                begin = clock(device)
                found = function()
                passed = clock(device) - begin
            if number == 0:
                expected = expected or found
                print(f"{name}: first {passed:.2f} s, off by {difference(found, expected):.1e}")
            else:
                times.setdefault(name, []).append(passed)
    loops = times["loops in place"]
    for name, found_times in times.items():
        ratios = [a / b for a, b in zip(found_times, loops, strict=True)]
        print(
            f"{name:22s} {1e3 * statistics.median(found_times):8.2f} ms, of the loops "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if options.profile:
        show_profiles(ways, device)


def segment(
    rows: int, hidden: int, length: int, device: torch.device, shared: bool
) -> Callable[[], list[Tensor]]:
    """A function that reads one segment and takes all of its gradients."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) / hidden**0.5
        return values.to(device).requires_grad_()

    state = [leaf(rows, hidden), leaf(rows, hidden)]
    own = leaf(rows, 4 * hidden, hidden)
    weights = [own, leaf(4 * hidden, hidden) if shared else leaf(rows, 4 * hidden, hidden)]
    leaves = [leaf(length, rows, hidden), *state, *weights, leaf(rows, 4 * hidden)]

    def run() -> list[Tensor]:
        outputs, last, cell = RowLSTM.apply(torch.float32, *leaves)
        loss = outputs.square().sum() + (last * cell).sum()
        return [outputs.detach(), *torch.autograd.grad(loss, leaves)]

    return run


@contextmanager
def loops() -> Iterator[None]:
    """The loops over time of `row_walks.py`."""
    others = replaced(compiled_walks, wanted=lambda _: False)
    with replaced(row_walks, gpu_walks_for=lambda *_: None), others:
        yield


@contextmanager
def walks(pieces: dict[str, OftenCalled[compiled_walks.Columns]]) -> Iterator[None]:
    """The walks of `compiled_walks.py` with these pieces."""
    others = replaced(compiled_walks, wanted=lambda _: True, **pieces)
    with replaced(row_walks, gpu_walks_for=lambda *_: None), others:
        yield


@contextmanager
def replaced(module: ModuleType, **others: Any) -> Iterator[None]:
    """Other functions in a module for a while."""
    names = vars(module)
    before = {name: names[name] for name in others}
    names.update(others)
    try:
        yield
    finally:
        names.update(before)


FUNCTIONS = {name: getattr(compiled_walks, name).function for name in PIECES}
PLAIN = {name: OftenCalled(function, 10**9) for name, function in FUNCTIONS.items()}
COMPILED = {name: OftenCalled(function, 0) for name, function in FUNCTIONS.items()}
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "loops in place": loops,
    "pure functions": lambda: walks(PLAIN),
    "compiled": lambda: walks(COMPILED),
}
ON_GPU: dict[str, Callable[[], AbstractContextManager[None]]] = {**WAYS, "kernels": nullcontext}
GRAPH = "loops as a graph"


def graph_of(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The loops captured as a CUDA graph, which reads and writes the same memory each time."""
    with loops():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return found

    return replay


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one, of the largest number of the same tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


def show_profiles(ways: dict[str, tuple[Any, Callable[[], Any]]], device: torch.device) -> None:
    """What the time of each way goes to: operations, or kernels on a CUDA device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_device_time_total"
    for name, (way, run) in ways.items():
        with way(), profile(activities=activities) as found:
            run()
            clock(device)
        print(name, found.key_averages().table(sort_by=order, row_limit=12), sep="\n")


if __name__ == "__main__":
    main()
