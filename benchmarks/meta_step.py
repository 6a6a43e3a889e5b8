"""What a first-order meta-training step costs beside the inner passes that it cannot do without.

    python benchmarks/meta_step.py [--preset small] [--rows 16] [--unroll 4] [--adapt "*"]
        [--rounds 7] [--bfloat16]

Three measurements take turns in one process: (a) forward and backward of `unroll` segments with
weights of their own in every row, and nothing else; (b) the whole first-order meta-training step:
the same passes, the updates, and the meta-gradient to the rule and to W_0, nothing recomputed; (c)
ordinary training on the same tokens with weights that the rows share. Printed: medians in
milliseconds, and the ratios b/a and b/c.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from metalm.language.network.model import LanguageModel
from metalm.language.network.segment_loss import SegmentLoss
from metalm.language.run.presets import preset_named
from metalm.language.text.article_batches import SegmentBatch
from metalm.meta.fork import forward_copy
from metalm.meta.meta_gradient import inner_gradient
from metalm.meta.parameters import choose, split
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.unroll import TwoLosses, unroll
from metalm.training.allocator import keep_freed_memory
from metalm.training.precision import reduced_products


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="whose model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--unroll", type=int, default=4)
    parser.add_argument("--segment", type=int, default=20)
    parser.add_argument("--adapt", nargs="+", default=["*"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = preset_named(options.preset).model
    model = LanguageModel(sizes).to(options.device).eval()
    names = choose(model, options.adapt)
    slow, rest = split(model, names)
    rms = {name: torch.rand_like(weight) * 1e-3 + 1e-4 for name, weight in slow.items()}
    rule = LearnedRates(rms, rate=1e-4, decay=1e-3).to(options.device)
    shape = (options.segment, options.rows)
    batches = [
        SegmentBatch(
            torch.randint(0, sizes.vocabulary_size, shape, device=options.device),
            torch.randint(0, sizes.vocabulary_size, shape, device=options.device),
            torch.ones(shape, device=options.device),
        )
        for _ in range(options.unroll)
    ]
    scored = SegmentLoss(model, options.segment)

    def loss(*arguments: Any) -> Any:
        with reduced_products(torch.device(options.device), options.bfloat16):
            return scored(*arguments)

    fast = {
        name: weight.detach().expand(options.rows, *weight.shape).clone()
        for name, weight in slow.items()
    }

    def inner() -> None:
        state = model.initial_state(options.rows)
        for batch in batches:
            leaves, shared = forward_copy(fast), forward_copy(rest)
            losses, _, state = loss({**shared, **leaves}, batch, state)
            inner_gradient(TwoLosses.of(losses).counted.sum(), {**leaves, **shared})
            state = tuple(type(s)(s.hidden.detach(), s.cell.detach()) for s in state)

    def meta() -> None:
        unrolled = unroll(
            loss,
            rule,
            slow,
            rest,
            batches,
            model.initial_state(options.rows),
            fast=fast,
            truncate=True,
        )
        for parameter in (*model.parameters(), *rule.parameters()):
            parameter.grad = None
        unrolled.meta_loss.backward()

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        state = model.initial_state(options.rows)
        for batch in batches:
            losses, _, state = loss(dict(model.named_parameters()), batch, state)
            TwoLosses.of(losses).counted.sum().backward()
            state = tuple(type(s)(s.hidden.detach(), s.cell.detach()) for s in state)

    times = take_turns([inner, meta, plain], options.rounds, options.device)
    a, b, c = (statistics.median(column) * 1e3 for column in times)
    tokens = options.rows * options.segment * options.unroll
    print(f"{options}\nfast parameters per row: {sum(w.numel() for w in slow.values()):,}")
    print(f"inner passes alone, a weight set a row : {a:8.0f} ms  {tokens / a * 1e3:8.0f} tokens/s")
    print(f"first-order meta-training step         : {b:8.0f} ms  {tokens / b * 1e3:8.0f} tokens/s")
    print(f"plain training, shared weights         : {c:8.0f} ms  {tokens / c * 1e3:8.0f} tokens/s")
    ratios = [y / x for x, y in zip(times[0], times[1], strict=True)]
    print(
        f"step / inner passes: {statistics.median(ratios):.3f} (of {len(ratios)} pairs: "
        f"{min(ratios):.3f} to {max(ratios):.3f}); step / plain training: {b / c:.2f}"
    )


def take_turns(functions: list[Callable[[], None]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each function, the functions taking turns, after one warm-up round."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, column in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if number > 0:
                column.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
