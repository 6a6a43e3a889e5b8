"""The one loop: a sequence of losses and updates, whose weighted sum is the meta-loss.

l_t = loss(W_t, batch_t)      g_t = dl_t/dW_t
W_{t+1}, s_{t+1} = rule(W_t, g_t, W_0, s_t; phi)      J = sum_t w_t l_t
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metalm.meta.checkpointing import run_segments
from metalm.meta.fork import forgotten, stack_rows
from metalm.meta.inner_problem import Batch, InnerProblem, LossFunction, State, Unrolled
from metalm.meta.meta_gradient import method_of
from metalm.meta.parameters import Parameters
from metalm.meta.tree import detach
from metalm.meta.update_rule import AbstractUpdateRule, Coefficients, RuleState

__all__ = ["Batch", "LossFunction", "State", "Unrolled", "unroll"]


def unroll(
    loss: LossFunction,
    rule: AbstractUpdateRule,
    slow: Parameters,
    rest: Parameters,
    batches: Sequence[Batch],
    state: State,
    *,
    fast: Parameters | None = None,
    rule_state: RuleState = None,
    coefficients: Coefficients = None,
    rows: int | None = None,
    truncate: bool = False,
    weights: Sequence[float] | None = None,
    order: int = 1,
    segment: int | None = None,
    overwrite: bool = False,
) -> Unrolled:
    """Take the losses and the updates of a sequence of batches, each loss before its update.

    Args:
        loss: Called with the fast weights and ``rest`` in one mapping.
        rule: The update rule.
        slow: W_0, each ``[*shape]``.
        rest: The parameters that do not adapt; those that require a gradient are meta-learned.
        batches: One for each step.
        state: What the loss carries from step to step; the gradient does not cross steps in it.
        fast: W at the first step; W_0 by default.
        rule_state: The rule's state at the first step; its initial state by default.
        coefficients: What ``rule.coefficients()`` gave; worked out here by default. Handing them
            over spares work where many short unrolls share one phi.
        rows: Number of rows of fast weights when ``fast`` is not given; None for weights like W_0.
        truncate: Forget the history of ``fast`` and of the rule's state, and hold W - W_0 constant,
            so that the gradient at the start goes on to W_0, as `rebase` has it, and to nothing
            else.
        weights: w_t of each step, 1 by default.
        order: Order of the meta-gradient, 0 for none or 1.
        segment: Keep W and the states at every so many updates only, and recompute the rest in the
            backward pass.
        overwrite: At order 0, write the updates into ``fast`` itself: no second copy in memory.

    Returns:
        The meta-loss and everything that the next unroll needs.

    Raises:
        ValueError: An order that does not exist, no batch, weights of another number, or nothing
            that may be overwritten.
    """
    if not batches:
        raise ValueError("nothing to unroll; expected at least one batch, found 0; do add one")
    if weights is None:
        weights = [1.0] * len(batches)
    if len(weights) != len(batches):
        raise ValueError(
            f"weights do not fit the batches; expected {len(batches)}, found {len(weights)}; "
            "do give one weight a step"
        )
    if overwrite and (fast is None or order != 0):
        raise ValueError(
            "nothing may be overwritten here; expected fast weights of the caller's own and order "
            f"0, found {'no fast weights' if fast is None else f'order {order}'}; do leave out "
            "overwrite"
        )
    if fast is None:
        start = forgotten(slow)
        fast, truncate = start if rows is None else stack_rows(start, rows), True
    elif truncate:
        fast = forgotten(fast)
    if truncate:
        rule_state = detach(rule_state)
    with torch.set_grad_enabled(order > 0 and torch.is_grad_enabled()):
        problem = InnerProblem(
            loss=loss,
            rule=rule,
            batches=batches,
            weights=weights,
            slow=slow,
            rest=rest,
            fast=fast,
            rule_state=rule.initial_state(fast) if rule_state is None else rule_state,
            coefficients=rule.coefficients() if coefficients is None else coefficients,
            state=detach(state),
            overwrite=overwrite,
            truncated=truncate,
        )
        method = method_of(order, rule)
        if segment is None or order == 0:
            return method(problem)
        return run_segments(problem, method, segment)
