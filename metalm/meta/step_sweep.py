"""First-order meta-gradient of W <- W - s g + rho (W_0 - W) over a whole sequence, in closed form.

These steps are linear in W, s and W_0, and g_t is a constant, so nothing but the g_t need be kept:
W_t is overwritten in place, and the backward sweep reads each g_t once. With keep = 1 - rho, and
J = sum_t w_t l_t, per coordinate and row:

    lambda_t = w_t g_t + keep lambda_{t+1}              dJ/dW_t
    mu_t     = lambda_{t+1} + keep mu_{t+1}             sum over u >= t of keep^(u-t) lambda_{u+1}
    dJ/ds    = - sum_t lambda_{t+1} g_t
    dJ/dW_0  = rho sum_t lambda_{t+1}                   (and lambda_0, where the first W is W_0)
    dJ/drho  = sum_t lambda_{t+1} (W_0 - W_t) = s sum_t mu_{t+1} g_t - mu_0 (W_first - W_0)

The last follows from W_t - W_0 = keep^t (W_first - W_0) - sum over u < t of keep^(t-1-u) s g_u.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.blocks import (
    Index,
    Number,
    add_product,
    add_rows,
    blocks,
    number_of,
    rows_of,
    zeros,
)
from metalm.meta.elementwise_step import as_tensor, write_step
from metalm.meta.inner_problem import InnerProblem, InnerStep, Unrolled, inner_step, weighted_sum
from metalm.meta.parameters import Parameters


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


class _Wanted(NamedTuple):
    """What a meta-gradient is asked for, of one fast tensor."""

    first: bool
    slow: bool
    rate: bool
    decay: bool


class _Sweep(torch.autograd.Function):
    """(first W, W_0, s, rho, shared) -> (meta-loss, last W)."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *tensors: Any) -> tuple[Tensor, ...]:
        problem = kept.problem
        num = len(problem.fast)
        first, slow, rates, decays = (tensors[i * num : (i + 1) * num] for i in range(4))
        needs = (ctx.needs_input_grad[1 + i * num :][:num] for i in range(4))
        wanted = [_Wanted(*flags) for flags in zip(*needs, strict=True)]
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
                new = _empty_like(fast[name]) if len(kept.losses) == 1 else fast[name]
                write_step(new, fast[name], gradient, slow[i], rates[i], decays[i])
                fast[name] = new
                if any(wanted[i]):
                    gradients[i].append(gradient)
        starts = [
            start if flags.decay and not _is_view_of(start, base) else None
            for start, base, flags in zip(first, slow, wanted, strict=True)
        ]
        ctx.set_materialize_grads(False)
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
        columns = []
        for i in range(num):
            steps, rest = rest[: ctx.counts[i]], rest[ctx.counts[i] :]
            sweep = _TensorSweep(slow[i], rates[i], decays[i], starts[i], ctx.wanted[i])
            columns.append(sweep.run(steps, ctx.weights, scale, to_last[i]))
        reached = [gradient for kind in zip(*columns, strict=True) for gradient in kind]
        return None, *reached, *(total * scale for total in rest)


class _TensorSweep:
    """The backward sweep of one fast tensor, block by block."""

    def __init__(
        self,
        slow: Tensor,
        rate: Tensor,
        decay: Tensor | None,
        start: Tensor | None,
        wanted: _Wanted,
    ) -> None:
        self.slow, self.rate, self.decay, self.start, self.wanted = slow, rate, decay, start, wanted
        self.lambda_gradient = zeros(slow.shape, slow) if wanted.rate else None
        self.lambda_sum = zeros(slow.shape, slow) if wanted.slow and decay is not None else None
        self.mu_gradient = zeros(slow.shape, slow) if wanted.decay else None
        self.mu_start = zeros(slow.shape, slow) if wanted.decay and start is not None else None

    def run(
        self, steps: list[Tensor], weights: list[float], scale: float, incoming: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (first W, W_0, s, rho), of scale times the weighted losses and of last W."""
        if not any(self.wanted) or (scale == 0 and incoming is None):
            return None, None, None, None
        # In units of the scale, w_t is 1 as a rule, which spares a pass; 0 has no such unit.
        unit = scale if scale != 0 else 1.0
        weights = [weight * scale / unit for weight in weights]
        like = steps[0]
        out = _empty_like(like) if self.wanted.first else None
        for block in blocks(self.slow):
            keep = None if self.decay is None else number_of(1 - self.decay, self.slow, block)
            for row in rows_of(like, self.slow, block):
                last = None if incoming is None else incoming[row] / unit
                adjoint = self._row([step[row] for step in steps], weights, keep, last, block, row)
                if out is not None and adjoint is not None:
                    torch.mul(adjoint, unit, out=out[row])
                elif out is not None:
                    out[row].zero_()
        return out, *self._totals(unit)

    def _row(
        self,
        steps: list[Tensor],
        weights: list[float],
        keep: Number | None,
        adjoint: Tensor | None,
        block: Index,
        row: Index,
    ) -> Tensor | None:
        """Sweep one row of one block; returns lambda_0. None stands for zeros."""
        mu: Tensor | None = None
        for gradient, weight in zip(reversed(steps), reversed(weights), strict=True):
            if adjoint is not None:
                if self.lambda_gradient is not None:
                    add_product(self.lambda_gradient[block], adjoint, gradient, 1)
                if self.lambda_sum is not None:
                    add_rows(self.lambda_sum[block], adjoint)
                if self.mu_gradient is not None:
                    if mu is not None:
                        add_product(self.mu_gradient[block], mu, gradient, 1)
                    mu = adjoint.clone() if mu is None else _added(adjoint, 1.0, keep, mu)
            adjoint = _added(gradient, weight, keep, adjoint)
        if self.mu_start is not None and self.start is not None and mu is not None:
            away = self.start[row] - self.slow[block]
            add_product(self.mu_start[block], mu, away, 1)
        return adjoint

    def _totals(self, unit: float) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of W_0, s and rho from the sums over rows and steps."""
        to_slow = to_rate = to_decay = None
        if self.lambda_sum is not None and self.decay is not None:
            to_slow = self.lambda_sum * (self.decay * unit)
        if self.lambda_gradient is not None:
            to_rate = self.lambda_gradient.sum_to_size(self.rate.shape) * -unit
        if self.mu_gradient is not None and self.decay is not None:
            total = self.mu_gradient * self.rate
            if self.mu_start is not None:
                total -= self.mu_start
            to_decay = total.sum_to_size(self.decay.shape) * unit
        return to_slow, to_rate, to_decay


def _added(
    gradient: Tensor, weight: float, keep: Number | None, total: Tensor | None
) -> Tensor | None:
    """Write weight * gradient + keep * total to total; one pass where the weight is 1."""
    if total is None:
        return gradient * weight if weight else None
    if weight != 1:
        if keep is not None:
            total.mul_(keep)
        return total.add_(gradient, alpha=weight) if weight else total
    if keep is None:
        return total.add_(gradient)
    if isinstance(keep, Tensor):
        return torch.addcmul(gradient, keep, total, out=total)
    return torch.add(gradient, total, alpha=keep, out=total)


def _add_weighted(sums: Parameters, gradients: Parameters, weight: float) -> None:
    """Add weight * gradient to the sums, which start as new tensors."""
    for name, gradient in gradients.items():
        if name in sums:
            sums[name].add_(gradient, alpha=weight)
        else:
            sums[name] = gradient * weight


def _empty_like(tensor: Tensor) -> Tensor:
    """Memory of its own even where the tensor is the same row many times."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _is_view_of(first: Tensor, slow: Tensor) -> bool:
    """Whether the first W is W_0 itself, so that their difference is zero."""
    return first.data_ptr() == slow.data_ptr() and (
        first.dim() == slow.dim() or first.stride(0) == 0
    )
