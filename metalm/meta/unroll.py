"""The one loop: a sequence of losses and updates, whose weighted sum is the meta-loss.

l_t = loss(W_t, batch_t)      g_t = dl_t/dW_t
W_{t+1}, s_{t+1} = rule(W_t, g_t, W_0, s_t; phi)      J = sum_t w_t l_t
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.meta.fork import forward_copy, stack_rows
from metalm.meta.meta_gradient import attach, check_order, inner_gradient
from metalm.meta.parameters import Parameters
from metalm.meta.update_rule import AbstractUpdateRule, RuleState

Batch = Any
State = Any
LossFunction = Callable[[Parameters, Batch, State], tuple[Tensor, Any, State]]
"""loss(parameters, batch, state) -> (losses ``[rows]`` or scalar, anything to keep, next state)."""


class Unrolled(NamedTuple):
    """What an unroll leaves behind."""

    meta_loss: Tensor
    """Scalar, sum over steps of w_t times the sum over rows of l_t; differentiable at order 1."""
    losses: Tensor
    """``[steps, rows]`` (``[steps]`` for scalar losses), without history."""
    aux: list[Any]
    """What the loss gave to keep, by step."""
    fast: Parameters
    """Fast weights after the last update, on the path from phi and W_0 at order 1."""
    rule_state: RuleState
    """The rule's state after the last update."""
    state: State
    """The loss's state after the last step, without history."""


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
    rows: int | None = None,
    weights: Sequence[float] | None = None,
    order: int = 1,
    segment: int | None = None,
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
        rows: Number of rows of fast weights when ``fast`` is not given; None for weights like W_0.
        weights: w_t of each step, 1 by default.
        order: Order of the meta-gradient, 0 for none or 1.
        segment: Keep W and the states at every so many updates only, and recompute the rest in the
            backward pass.

    Returns:
        The meta-loss and everything that the next unroll needs.

    Raises:
        ValueError: An order that does not exist, no batch, or weights of another number.
    """
    check_order(order)
    if not batches:
        raise ValueError("nothing to unroll; expected at least one batch, found 0; do add one")
    if weights is None:
        weights = [1.0] * len(batches)
    if len(weights) != len(batches):
        raise ValueError(
            f"weights do not fit the batches; expected {len(batches)}, found {len(weights)}; "
            "do give one weight a step"
        )
    if fast is None:
        fast = slow if rows is None else stack_rows(slow, rows)
    if rule_state is None:
        rule_state = rule.initial_state(fast)
    with torch.set_grad_enabled(order > 0):
        coefficients = rule.coefficients()
        losses, aux = [], []
        terms = []
        for batch, weight in zip(batches, weights, strict=True):
            with torch.enable_grad():
                leaves = forward_copy(fast)
                learned = {n: t for n, t in rest.items() if t.requires_grad and order > 0}
                shared = forward_copy(learned)
                step_losses, kept, state = loss({**rest, **shared, **leaves}, batch, state)
                gradients = inner_gradient(step_losses.sum(), {**leaves, **shared})
            state = detach(state)
            losses.append(step_losses.detach())
            aux.append(kept)
            if order == 0:
                terms.append(losses[-1].sum() * weight)
            elif weight != 0:
                attached = attach(losses[-1].sum(), gradients, {**fast, **learned})
                terms.append(attached if weight == 1 else attached * weight)
            fast, rule_state = rule(fast, gradients, slow, rule_state, coefficients)
        meta_loss = torch.stack(terms).sum() if terms else torch.zeros(())
    return Unrolled(meta_loss, torch.stack(losses), aux, fast, rule_state, state)


def detach(tree: Any) -> Any:
    """The same tree of tuples, named tuples, lists and mappings, its tensors without history."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, dict):
        return {name: detach(value) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(detach(value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(detach(value) for value in tree)
    return tree
