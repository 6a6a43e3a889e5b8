"""The one loop: a sequence of losses and updates, whose weighted sum is the meta-loss.

l_t = loss(W_t, batch_t)      g_t = dl_t/dW_t
W_{t+1}, s_{t+1} = rule(W_t, g_t, W_0, s_t; phi)      J = sum_t w_t l_t
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metalm.meta.checkpointing import run_segments
from metalm.meta.fork import forgotten, stack_rows
from metalm.meta.inner_problem import (
    Batch,
    InnerProblem,
    LossFunction,
    State,
    TwoLosses,
    Unrolled,
)
from metalm.meta.meta_gradient import Mode, method_of
from metalm.meta.parameters import Parameters
from metalm.meta.segment_length import Segment
from metalm.meta.tree import detach
from metalm.meta.update_rule import AbstractUpdateRule, Coefficients, RuleState

__all__ = ["Batch", "LossFunction", "State", "TwoLosses", "Unrolled", "unroll"]


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
    mode: Mode = "reverse",
    traces: Parameters | None = None,
    segment: Segment | None = None,
    update_last: bool = True,
    overwrite: bool = False,
    apart: bool = False,
) -> Unrolled:
    """Take the losses and the updates of a sequence of batches, each loss before its update.

    Args:
        loss: Called with the fast weights and ``rest`` in one mapping.
        rule: The update rule.
        slow: W_0, each ``[*shape]``.
        rest: The parameters that do not adapt; those that require a gradient are meta-learned.
        batches: One for each step.
        state: What the loss carries from step to step; the gradient crosses steps in it at order 2
            alone, and never leaves the unroll.
        fast: W at the first step; W_0 by default.
        rule_state: The rule's state at the first step; its initial state by default.
        coefficients: What ``rule.coefficients()`` gave; worked out here by default. Handing them
            over spares work where many short unrolls share one phi.
        rows: Number of rows of fast weights when ``fast`` is not given; None for weights like W_0.
        truncate: Forget the history of ``fast`` and of the rule's state, and hold W - W_0 constant,
            so that the gradient at the start goes on to W_0, as `rebase` has it, and to nothing
            else.
        weights: w_t of each step, 1 by default.
        order: Order of the meta-gradient: 0 for none, 1 with the inner gradients held constant, 2
            for the exact one, through them.
        mode: "reverse" takes the meta-gradient back from the last step; "forward" carries it along
            from where each row began at W_0, at order 1 for rules under `AbstractStepRule`.
        traces: In forward mode, what the unroll before gave with ``fast`` (or `initial_traces`,
            where every row of ``fast`` is W_0); W_t depends on phi through these alone.
        segment: Keep W and the states at every so many updates only, and recompute the rest in the
            backward pass; or "auto", "least" or a `Budget` of bytes, see `Segment`. The gradient
            then reaches phi, W_0, ``rest``, ``fast`` and ``rule_state`` alone: not tensors that
            the loss closes over, nor those of a batch.
        update_last: Whether the last loss is learnt from; without, ``fast`` are the weights that
            it was taken at (a few-shot task's queries).
        overwrite: At order 0 and in forward mode, write the updates into ``fast`` and ``traces``
            themselves: no second copy in memory.
        apart: Whether the loss gives `TwoLosses`, and the meta-gradient is that of what counts; at
            order 1 every rule then goes the way of those without a closed form, and the model has
            a second backward pass. Order 0 need not be told.

    Returns:
        The meta-loss and everything that the next unroll needs.

    Raises:
        ValueError: Nothing that could learn, an order or a mode that does not exist or does not fit
            the rule, no batch, weights of another number, fast weights without the traces that
            forward mode needs, nothing that may be overwritten, or a segment that there cannot be.
    """
    method = method_of(order, mode, rule, apart)
    forward = mode == "forward" and order > 0
    _check_learns(slow)
    if not batches:
        raise ValueError("nothing to unroll; expected at least one batch, found 0; do add one")
    if weights is None:
        weights = [1.0] * len(batches)
    if len(weights) != len(batches):
        raise ValueError(
            f"weights do not fit the batches; expected {len(batches)}, found {len(weights)}; "
            "do give one weight a step"
        )
    if forward:
        _check_forward(fast, traces, segment, update_last)
    if overwrite and (fast is None or (order != 0 and not forward)):
        raise ValueError(
            "nothing may be overwritten here; expected fast weights of the caller's own and order "
            "0 or forward mode, found "
            f"{'no fast weights' if fast is None else f'order {order}'}; do leave out overwrite"
        )
    if fast is None:
        start = forgotten(slow)
        fast, truncate = start if rows is None else stack_rows(start, rows), True
    elif truncate or forward:
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
            traces=traces,
            update_last=update_last,
            apart=apart,
        )
        if segment is None or order == 0:
            result = method(problem)
        else:
            result = run_segments(problem, method, segment)
    return result._replace(state=detach(result.state))


def _check_forward(
    fast: Parameters | None, traces: Parameters | None, segment: Segment | None, update_last: bool
) -> None:
    if fast is not None and traces is None:
        raise ValueError(
            "fast weights without traces; expected in forward mode the traces that came with them, "
            "found none; do hand over those of the unroll before, or initial_traces() for rows "
            "that begin at W_0"
        )
    if segment is not None:
        raise ValueError(
            "checkpoints in forward mode, which has no backward pass through the updates; expected "
            f"no segment, found {segment}; do leave it out"
        )
    if not update_last:
        raise ValueError(
            "forward mode learns from every loss; expected update_last=True, found False; do use "
            "mode='reverse'"
        )


def _check_learns(slow: Parameters) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "updates follow gradients, which inference mode has none of; expected the unroll "
            "outside of torch.inference_mode(), found it inside; do use torch.no_grad() instead"
        )
    if not slow:
        raise ValueError(
            "nothing would learn; expected at least one fast parameter, found none; do name some"
        )
    for name, tensor in slow.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name!r} cannot learn; expected fast parameters of floating point, found "
                f"{str(tensor.dtype).removeprefix('torch.')}; do leave it out of the fast ones"
            )
