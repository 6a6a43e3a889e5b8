"""First-order meta-gradient of W <- W - s g + rho (W_0 - W) over a whole sequence, in closed form.

These steps are linear in W, s and W_0, and g_t is a constant, so nothing but the g_t need be kept:
W_t is overwritten in place, and the backward sweep reads each g_t once
(`kernels/step_gradients.py` has the equations).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.elementwise_step import as_tensor, kernels_for, memory_like, write_step
from metalm.meta.inner_problem import InnerProblem, InnerStep, Unrolled, inner_step, weighted_sum
from metalm.meta.kernels.step_gradients import StepGradients, Steps, Wanted
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
        histories = [_History(*pair) for pair in zip(decays, wanted, strict=True)]
        for batch, weight, learns in problem.steps():
            taken = inner_step(problem, fast, shared if weight else {}, batch, kept.state)
            kept.add(taken)
            if weight:
                _add_weighted(sums, {name: taken.counted[name] for name in shared}, weight)
            for i, name in enumerate(problem.fast):
                gradient = taken.gradients[name]
                histories[i].add(gradient, weight, learns)
                if learns:
                    # The caller's weights stay as they are; every later W_t is overwritten.
                    new = memory_like(fast[name]) if len(kept.losses) == 1 else fast[name]
                    rate = problem.coefficients.rates[name]
                    write_step(new, fast[name], gradient, slow[i], rate, decays[i])
                    fast[name] = new
        starts = [
            start if flags.decay and not _is_view_of(start, base) else None
            for start, base, flags in zip(first, slow, wanted, strict=True)
        ]
        ctx.set_materialize_grads(False)
        ctx.truncated = problem.truncated
        ctx.num, ctx.wanted, ctx.unused = num, wanted, len(shared) - len(sums)
        # What is left of a history lies in the saved tensors, where autograd frees it.
        gradients = [history.taken() for history in histories]
        ctx.histories, ctx.counts = histories, [len(tensors) for tensors in gradients]
        ctx.save_for_backward(
            *slow,
            *rates,
            *decays,
            *starts,
            *(g for tensors in gradients for g in tensors),
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
        columns: list[tuple[Tensor | None, ...]] = []
        for i in range(num):
            gradients, rest = rest[: ctx.counts[i]], rest[ctx.counts[i] :]
            steps = Steps([], [], slow[i], rates[i], decays[i], starts[i], ctx.truncated)
            found = ctx.histories[i].sweep(gradients, steps, scale, to_last[i], ctx.wanted[i])
            columns.append((found.first, *found.of_shapes(rates[i], decays[i])))
        reached = [gradient for kind in zip(*columns, strict=True) for gradient in kind]
        return None, *reached, *(total * scale for total in rest), *(None,) * ctx.unused


class _History:
    """What the steps of one tensor leave for the sweep.

    Without a decay and with a rate that is not learned, lambda_0 = lambda_K + sum_t w_t g_t is all
    that is asked for, so that one sum takes the place of the g_t.

    Args:
        decay: rho of the tensor.
        wanted: what is asked for.
    """

    def __init__(self, decay: Tensor | None, wanted: Wanted) -> None:
        self.idle = not any(wanted)
        self.summed = decay is None and not wanted.rate
        self.weights: list[float] = []
        self._gradients: list[Tensor] = []
        self._last: list[Tensor] = []
        self.last_weight = 0.0

    def add(self, gradient: Tensor, weight: float, learns: bool) -> None:
        """Note g_t of a step."""
        if self.idle or (self.summed and not weight):
            return
        if self.summed:
            if self._gradients:
                self._gradients[0].add_(gradient, alpha=weight)
            else:
                self._gradients.append(gradient * weight)
        elif learns:
            self._gradients.append(gradient)
            self.weights.append(weight)
        elif weight:
            self._last.append(gradient)
            self.last_weight = weight

    def taken(self) -> list[Tensor]:
        """Hand over the tensors: the gradients, and last that of a loss not learnt from."""
        tensors = [*self._gradients, *self._last]
        self._gradients, self._last = [], []
        return tensors

    def sweep(
        self,
        tensors: list[Tensor],
        steps: Steps,
        scale: float,
        incoming: Tensor | None,
        wanted: Wanted,
    ) -> StepGradients:
        """Go back through the steps.

        Args:
            tensors: what `taken` gave.
            steps: of this tensor, without gradients.
            scale: the gradient of the meta-loss.
            incoming: the gradient of the last W; None for zeros.
            wanted: what is asked for.
        """
        if self.idle or (incoming is None and (scale == 0 or not tensors)):
            return StepGradients(None, None, None, None)
        count = len(self.weights)
        for gradient in tensors[count:]:
            share = gradient * (scale if self.summed else scale * self.last_weight)
            incoming = share if incoming is None else incoming + share
        if not count:
            return _carried(incoming, steps, wanted)
        weights = [weight * scale for weight in self.weights]
        steps = steps._replace(gradients=tensors[:count], weights=weights)
        return kernels_for(steps.slow).sweep(steps, incoming, wanted)


def _carried(incoming: Tensor | None, steps: Steps, wanted: Wanted) -> StepGradients:
    """lambda_0 = lambda_K: what steps without decay leave of it, where nothing else is known."""
    to_slow = None
    if incoming is not None and steps.truncated and wanted.slow:
        to_slow = incoming if incoming.dim() == steps.slow.dim() else incoming.sum(0)
    return StepGradients(incoming if wanted.first else None, to_slow, None, None)


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
