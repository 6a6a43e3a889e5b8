"""How the meta-gradient runs through a sequence of inner gradients.

First order: g_t is a constant of the rule, and dl_t/dW_t is that same g_t, which the inner step has
already computed: here for any rule, in `step_sweep.py` in closed form, in `forward_mode.py` carried
along. Second order: `second_order.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from metalm.meta.attach import attach
from metalm.meta.fork import rebase
from metalm.meta.forward_mode import traced_steps, with_forward_mode
from metalm.meta.inner_problem import (
    InnerProblem,
    Unrolled,
    inner_gradient,
    inner_step,
)
from metalm.meta.plain_steps import plain_steps
from metalm.meta.second_order import exact_steps
from metalm.meta.step_rule import AbstractStepRule
from metalm.meta.step_sweep import swept_steps
from metalm.meta.update_rule import AbstractUpdateRule

__all__ = ["Mode", "graph_steps", "inner_gradient", "method_of", "plain_steps"]

Method = Callable[[InnerProblem], Unrolled]
Mode = Literal["reverse", "forward"]


def method_of(order: int, mode: Mode, rule: AbstractUpdateRule, apart: bool = False) -> Method:
    """How to run the steps for an order of the meta-gradient and a direction to take it in.

    Args:
        order: Of the meta-gradient.
        mode: Its direction.
        rule: What learns.
        apart: Whether something else is learnt from than what counts.

    Raises:
        ValueError: An order or a mode that does not exist, or a mode that the order, the rule or
            the losses do not have.
    """
    if order not in (0, 1, 2):
        raise ValueError(
            f"no meta-gradient of order {order}; expected 0 (none), 1 (first order) or 2 (exact), "
            f"found {order}; do choose one of them"
        )
    if mode not in ("reverse", "forward"):
        raise ValueError(
            f"unknown mode; expected 'reverse' or 'forward', found {mode!r}; do choose one"
        )
    if order == 0:
        return plain_steps
    if mode == "forward":
        return _forward_method(order, rule, apart)
    if order == 2:
        return exact_steps
    return swept_steps if isinstance(rule, AbstractStepRule) and not apart else graph_steps


def _forward_method(order: int, rule: AbstractUpdateRule, apart: bool) -> Method:
    if order != 1:
        raise ValueError(
            f"no forward mode of order {order}; expected order 1, found {order}; do use "
            "mode='reverse', which has both orders"
        )
    if apart:
        raise ValueError(
            "forward mode learns from what counts; expected one loss a step, found two of them; do "
            "use mode='reverse'"
        )
    with_forward_mode(rule)
    return traced_steps


def graph_steps(problem: InnerProblem) -> Unrolled:
    """First order for any rule: autograd through the updates, each inner gradient attached."""
    fast, rule_state, state = problem.fast, problem.rule_state, problem.state
    if problem.truncated:
        fast = rebase(fast, problem.slow)
    shared = problem.shared()
    losses, aux, terms = [], [], []
    for batch, weight, learns in problem.steps():
        counted = shared if weight else {}
        taken = inner_step(problem, fast, counted, batch, state)
        losses.append(taken.losses)
        aux.append(taken.aux)
        state = taken.state
        total = taken.losses.sum()
        if weight:
            attached = attach(total, taken.counted, {**shared, **fast})
            terms.append(attached if weight == 1 else attached * weight)
        if not learns:
            break
        rule_state = problem.rule.observe(rule_state, taken.losses, taken.aux)
        fast, rule_state = problem.rule(
            fast, taken.gradients, problem.slow, rule_state, problem.coefficients
        )
    meta_loss = torch.stack(terms).sum() if terms else losses[0].new_zeros(())
    return Unrolled(meta_loss, torch.stack(losses), aux, fast, rule_state, state)
