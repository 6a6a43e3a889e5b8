"""First-order meta-gradient of W <- W - s g + rho (W_0 - W) over a whole sequence, in closed form.

These steps are linear in W, s and W_0, and g_t is a constant, so nothing but the g_t need be kept:
W_t is overwritten in place, and the backward sweep reads each g_t once (`step_gradients.py` has the
equations).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.elementwise_step import as_tensor, kernels_for, memory_like, write_step
from metalm.meta.inner_problem import InnerProblem, InnerStep, Unrolled, inner_step, weighted_sum
from metalm.meta.parameters import Parameters
from metalm.meta.step_gradients import Steps, Wanted


def swept_steps(problem: InnerProblem) -> Unrolled:
    """First order for a rule that is an `AbstractStepRule`."""
    names = list(problem.fast)
    rates, decays = problem.coefficients
    numbers = [as_tensor(rates[name], problem.slow[name]) for name in names]
    shares = [
        None if (decay := decays[name]) is None else as_tensor(decay, problem.slow[name])
        for name in names
    ]
    kept = _Kept(problem)
    meta_loss, *new = _Sweep.apply(
        kept,
        *(problem.fast[name] for name in names),
        *(problem.slow[name] for name in names),
        *numbers,
        *shares,
        *problem.shared().values(),
    )
    fast = dict(zip(names, new, strict=True))
    return Unrolled(
        meta_loss, torch.stack(kept.losses), kept.aux, fast, problem.rule_state, kept.state
    )


class _Kept:
    """What the steps leave beside the tensors that autograd sees."""

    def __init__(self, problem: InnerProblem) -> None:
        self.problem = problem
        self.losses: list[Tensor] = []
        self.aux: list[Any] = []
        self.state = problem.state

    def add(self, taken: InnerStep) -> None:
        """Note what a step leaves."""
        self.losses.append(taken.losses)
        self.aux.append(taken.aux)
        self.state = taken.state


class _Sweep(torch.autograd.Function):
    """(first W, W_0, s, rho, shared) -> (meta-loss, last W)."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *tensors: Any) -> tuple[Tensor, ...]:
        problem = kept.problem
        num = len(problem.fast)
        first, slow, rates, decays = (tensors[i * num : (i + 1) * num] for i in range(4))
        needs = (ctx.needs_input_grad[1 + i * num :][:num] for i in range(4))
        wanted = [Wanted(*flags) for flags in zip(*needs, strict=True)]
        shared = problem.shared()
        sums: Parameters = {}
        fast = dict(problem.fast)
        gradients: list[list[Tensor]] = [[] for _ in range(num)]
        for batch, weight in zip(problem.batches, problem.weights, strict=True):
            taken = inner_step(problem, fast, shared, batch, kept.state)
            kept.add(taken)
            _add_weighted(sums, {name: taken.gradients[name] for name in shared}, weight)
            for i, name in enumerate(problem.fast):
                gradient = taken.gradients[name]
                # The caller's weights stay as they are; every later W_t is overwritten.
                new = memory_like(fast[name]) if len(kept.losses) == 1 else fast[name]
                write_step(new, fast[name], gradient, slow[i], rates[i], decays[i])
                fast[name] = new
                if any(wanted[i]):
                    gradients[i].append(gradient)
        starts = [
            start if flags.decay and not _is_view_of(start, base) else None
            for start, base, flags in zip(first, slow, wanted, strict=True)
        ]
        ctx.set_materialize_grads(False)
        ctx.truncated = problem.truncated
        ctx.num, ctx.wanted, ctx.weights = num, wanted, list(problem.weights)
        ctx.counts = [len(steps) for steps in gradients]
        ctx.save_for_backward(
            *slow,
            *rates,
            *decays,
            *starts,
            *(g for steps in gradients for g in steps),
            *sums.values(),
        )
        return weighted_sum(torch.stack(kept.losses), problem.weights), *fast.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_loss: Tensor | None, *to_last: Tensor | None) -> tuple[Any, ...]:
        num, saved = ctx.num, ctx.saved_tensors
        slow, rates, decays, starts = (saved[i * num : (i + 1) * num] for i in range(4))
        rest = list(saved[4 * num :])
        scale = 0.0 if to_loss is None else to_loss.item()
        weights = [weight * scale for weight in ctx.weights]
        columns: list[tuple[Tensor | None, ...]] = []
        for i in range(num):
            gradients, rest = rest[: ctx.counts[i]], rest[ctx.counts[i] :]
            if not gradients or (scale == 0 and to_last[i] is None):
                columns.append((None, None, None, None))
                continue
            steps = Steps(
                gradients, weights, slow[i], rates[i], decays[i], starts[i], ctx.truncated
            )
            found = kernels_for(slow[i]).sweep(steps, to_last[i], ctx.wanted[i])
            columns.append((found.first, *found.of_shapes(rates[i], decays[i])))
        reached = [gradient for kind in zip(*columns, strict=True) for gradient in kind]
        return None, *reached, *(total * scale for total in rest)


def _add_weighted(sums: Parameters, gradients: Parameters, weight: float) -> None:
    """Add weight * gradient to the sums, which start as new tensors."""
    for name, gradient in gradients.items():
        if name in sums:
            sums[name].add_(gradient, alpha=weight)
        else:
            sums[name] = gradient * weight


def _is_view_of(first: Tensor, slow: Tensor) -> bool:
    """Whether the first W is W_0 itself, so that their difference is zero."""
    return first.data_ptr() == slow.data_ptr() and (
        first.dim() == slow.dim() or first.stride(0) == 0
    )
