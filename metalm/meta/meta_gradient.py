"""How the meta-gradient runs through a sequence of inner gradients.

First order: g_t is a constant of the rule, and dl_t/dW_t is that same g_t, which the inner step has
already computed. Second order and forward mode have their place here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.fork import rebase
from metalm.meta.inner_problem import (
    InnerProblem,
    Unrolled,
    inner_gradient,
    inner_step,
    weighted_sum,
)
from metalm.meta.parameters import Parameters
from metalm.meta.step_rule import AbstractStepRule
from metalm.meta.step_sweep import swept_steps
from metalm.meta.update_rule import AbstractUpdateRule

__all__ = ["attach", "graph_steps", "inner_gradient", "method_of", "plain_steps"]

Method = Callable[[InnerProblem], Unrolled]


def method_of(order: int, rule: AbstractUpdateRule) -> Method:
    """How to run the steps for an order of the meta-gradient.

    Raises:
        ValueError: An order that does not exist.
    """
    if order not in (0, 1):
        raise ValueError(
            f"no meta-gradient of order {order}; expected 0 (none) or 1 (first order, which is "
            f"what exists), found {order}; do use order=1"
        )
    if order == 0:
        return plain_steps
    return swept_steps if isinstance(rule, AbstractStepRule) else graph_steps


@torch.no_grad()
def plain_steps(problem: InnerProblem) -> Unrolled:
    """Adapt only: no meta-gradient, nothing kept."""
    fast, rule_state, state = problem.fast, problem.rule_state, problem.state
    losses, aux = [], []
    for batch in problem.batches:
        taken = inner_step(problem, fast, {}, batch, state)
        losses.append(taken.losses)
        aux.append(taken.aux)
        state = taken.state
        rule_state = problem.rule.observe(rule_state, taken.losses)
        update = (fast, taken.gradients, problem.slow, rule_state, problem.coefficients)
        if problem.overwrite:
            rule_state = problem.rule.update_(*update)
        else:
            fast, rule_state = problem.rule(*update)
    stacked = torch.stack(losses)
    return Unrolled(weighted_sum(stacked, problem.weights), stacked, aux, fast, rule_state, state)


def graph_steps(problem: InnerProblem) -> Unrolled:
    """First order for any rule: autograd through the updates, each inner gradient attached."""
    fast, rule_state, state = problem.fast, problem.rule_state, problem.state
    if problem.truncated:
        fast = rebase(fast, problem.slow)
    shared = problem.shared()
    losses, aux, terms = [], [], []
    for batch, weight in zip(problem.batches, problem.weights, strict=True):
        taken = inner_step(problem, fast, shared, batch, state)
        losses.append(taken.losses)
        aux.append(taken.aux)
        state = taken.state
        total = taken.losses.sum()
        if weight:
            attached = attach(total, taken.gradients, {**shared, **fast})
            terms.append(attached if weight == 1 else attached * weight)
        rule_state = problem.rule.observe(rule_state, taken.losses)
        fast, rule_state = problem.rule(
            fast, taken.gradients, problem.slow, rule_state, problem.coefficients
        )
    meta_loss = torch.stack(terms).sum() if terms else losses[0].new_zeros(())
    return Unrolled(meta_loss, torch.stack(losses), aux, fast, rule_state, state)


def attach(loss: Tensor, gradients: Parameters, copies: Parameters) -> Tensor:
    """The loss as a number on the graph of the backward copies, with g as its known gradient.

    Args:
        loss: Scalar; its own graph is not used.
        gradients: d loss / d forward copy, by name.
        copies: Backward copies of the same names.

    Returns:
        A scalar equal to ``loss`` whose gradient to each copy is the given one.
    """
    attached: Tensor = _Attach.apply(
        loss.detach(),
        len(copies),
        *(gradients[name] for name in copies),
        *copies.values(),
    )
    return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, num: int, *tensors: Tensor) -> Tensor:
        ctx.num = num
        ctx.save_for_backward(*tensors[:num])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2 + ctx.num :]
        reached = (
            scale * gradient if need else None
            for gradient, need in zip(ctx.saved_tensors, needs, strict=True)
        )
        return (None, None, *(None,) * ctx.num, *reached)
