"""Metalm beside other libraries for meta-learning: time, memory and the meta-gradient of MAML.

    python benchmarks/meta_libraries.py BENCH.py --lib metalm,higher,torchopt --order both
    python benchmarks/meta_libraries.py BENCH.py --lib metalm,metalm-auto --check --tasks 4
    python benchmarks/meta_libraries.py BENCH.py --lib metalm-auto,higher --live --inner 50

BENCH.py is a script that measures one meta-step of MAML through one library after the other, and
takes further ones from a file: ``--adapter FILE``, in which ``@adapter(name)`` registers a function
``(net, cfg) -> meta_grad``; cfg has order, inner, inner_lr, segment. This file is such an adapter,
and hands itself over when it is run. All arguments after BENCH.py are that script's own.

    metalm                  tasks one by one, every graph kept; layers fused (`fused`)
    metalm-unfused          the same with the layers as they are, as the other libraries run them
    metalm-auto             the same in segments, two thirds of the steps taken again at most
    metalm-least            the same in segments that need least memory
    metalm-together         tasks side by side
    metalm-together-unfused the same with the layers as they are
    metalm-channels-last    one by one, pictures and kernels with channels last in memory
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.meta.layers.fused_layers import fused
from metalm.meta.module_fork import ForkUnrolled, fork
from metalm.meta.rules import GradientDescent
from metalm.meta.segment_length import Segment
from metalm.meta.tasks import backward_over_tasks

Tasks = tuple[Tensor, Tensor, Tensor, Tensor]


def meta_gradient(
    net: nn.Module,
    cfg: Any,
    *,
    together: int | None = 1,
    segment: Segment | None = None,
    layout: Literal["channels first", "channels last"] = "channels first",
    layers: Literal["fused", "as they are"] = "fused",
) -> Callable[[Tasks], float]:
    """A function that leaves the gradient of the mean query loss in ``.grad``."""
    rule = GradientDescent(cfg.inner_lr)
    weights = [0.0] * cfg.inner + [1.0]
    if layers == "fused":
        net = fused(net)
    if layout == "channels last":
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        if layout == "channels last":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return functional.cross_entropy(model(inputs), targets)

    def learn(tasks: int | None, batches: list[Any]) -> ForkUnrolled:
        return fork(net, tasks=tasks).unroll(
            rule,
            batches,
            loss,
            weights=weights,
            order=cfg.order,
            segment=segment,
            update_last=False,
        )

    def run(tasks: Tasks) -> float:
        support, query = tasks[:2], tasks[2:]
        done = backward_over_tasks([*[support] * cfg.inner, query], learn, together)
        return done.losses[-1].mean().item()

    return run


WAYS: dict[str, dict[str, Any]] = {
    "metalm": {},
    "metalm-unfused": {"layers": "as they are"},
    "metalm-auto": {"segment": "auto"},
    "metalm-least": {"segment": "least"},
    "metalm-together": {"together": None},
    "metalm-together-unfused": {"together": None, "layers": "as they are"},
    "metalm-channels-last": {"layout": "channels last", "layers": "as they are"},
}


def register(adapter: Callable[[str], Callable[[Any], Any]]) -> None:
    """Hand every way to the script's register."""
    for name, options in WAYS.items():
        adapter(name)(lambda net, cfg, options=options: meta_gradient(net, cfg, **options))


def main(arguments: list[str]) -> int:
    """Run the script with this file as its adapter."""
    if not arguments or not Path(arguments[0]).is_file():
        found = arguments[0] if arguments else "nothing"
        print(f"no script to run; expected the path of one, found {found}; see {__file__}")
        return 2
    script, *rest = arguments
    command = [sys.executable, script, "--adapter", str(Path(__file__).resolve()), *rest]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif "bench_meta_libs" in sys.modules:
    register(sys.modules["bench_meta_libs"].adapter)
