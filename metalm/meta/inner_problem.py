"""What is unrolled, and what an unroll leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.meta.fork import forward_copy
from metalm.meta.parameters import Parameters
from metalm.meta.tree import detach
from metalm.meta.update_rule import AbstractUpdateRule, Coefficients, RuleState

Batch = Any
State = Any


class TwoLosses(NamedTuple):
    """What counts, and what is learnt from in its place; each ``[rows]`` or scalar."""

    counted: Tensor
    """l_t of the meta-loss, and what a rule observes."""
    learnt: Tensor
    """Its gradient is g_t."""

    @classmethod
    def of(cls, losses: Tensor | TwoLosses) -> TwoLosses:
        """Both, from what a loss gives: often they are one."""
        return losses if isinstance(losses, TwoLosses) else cls(losses, losses)


LossFunction = Callable[[Parameters, Batch, State], tuple[Tensor | TwoLosses, Any, State]]
"""loss(parameters, batch, state) -> (losses ``[rows]`` or scalar, or two of them; anything to keep;
next state)."""


@dataclass(frozen=True, kw_only=True)
class InnerProblem:
    """A sequence of losses and updates; every tensor that a meta-gradient may reach is a field."""

    loss: LossFunction
    rule: AbstractUpdateRule
    batches: Sequence[Batch]
    weights: Sequence[float]
    """w_t, one a step."""
    slow: Parameters
    """W_0."""
    rest: Parameters
    """Parameters that do not adapt."""
    fast: Parameters
    """W at the first step."""
    rule_state: RuleState
    coefficients: Coefficients
    """What the rule worked out for all steps."""
    state: State
    """What the loss carries from step to step."""
    overwrite: bool = False
    """Whether the updates are written into ``fast`` and the traces (order 0, forward mode)."""
    truncated: bool = False
    """Whether ``fast`` is W_0 plus something constant; it then has no history of its own."""
    traces: Parameters | None = None
    """What forward mode carries beside ``fast``; None for zeros."""
    update_last: bool = True
    """Whether the last loss is learnt from, too."""
    apart: bool = False
    """Whether the loss gives `TwoLosses`."""

    @property
    def updates(self) -> int:
        """Steps that are learnt from."""
        return len(self.batches) if self.update_last else len(self.batches) - 1

    def part(self, start: int, stop: int) -> InnerProblem:
        """The same problem with the batches from start to before stop."""
        return replace(
            self,
            batches=self.batches[start:stop],
            weights=self.weights[start:stop],
            update_last=self.update_last or stop < len(self.batches),
        )

    def steps(self) -> Iterator[tuple[Batch, float, bool]]:
        """Each batch, its w_t, and whether its loss is learnt from."""
        last = len(self.batches) - 1
        for t, (batch, weight) in enumerate(zip(self.batches, self.weights, strict=True)):
            yield batch, weight, t < last or self.update_last

    def shared(self) -> Parameters:
        """The parameters outside of the fast ones that the meta-gradient reaches."""
        return {name: tensor for name, tensor in self.rest.items() if tensor.requires_grad}


class Unrolled(NamedTuple):
    """What an unroll leaves behind."""

    meta_loss: Tensor
    """Scalar, sum over steps of w_t times the sum over rows of l_t; differentiable from order 1."""
    losses: Tensor
    """``[steps, rows]`` (``[steps]`` for scalar losses), without history."""
    aux: list[Any]
    """What the loss gave to keep, by step, without history."""
    fast: Parameters
    """Fast weights after the last update, on the path from phi and W_0 in reverse mode."""
    rule_state: RuleState
    """The rule's state after the last update."""
    state: State
    """The loss's state after the last step, without history."""
    traces: Parameters | None = None
    """Forward mode: what the path from phi is kept in, for the next unroll."""

    def cut(self) -> Unrolled:
        """The same, with no history behind the last W and state of the rule.

        Whoever asks for the gradient of the meta-loss alone need not keep the graph of the last
        update in memory meanwhile.
        """
        return self._replace(fast=detach(self.fast), rule_state=detach(self.rule_state))


class InnerStep(NamedTuple):
    """One loss and its gradient, everything without history."""

    losses: Tensor
    gradients: Parameters
    """Of the sum of what is learnt from, for each fast tensor."""
    counted: Parameters
    """Of the sum of the losses that count, for each fast tensor and each shared one; often these
    are the same."""
    aux: Any
    state: State


def inner_step(
    problem: InnerProblem,
    fast: Parameters,
    shared: Parameters,
    batch: Batch,
    state: State,
    counts: bool = True,
) -> InnerStep:
    """Take the loss on forward copies of the fast and the shared weights, and its gradients.

    Args:
        problem: Has the loss.
        fast: W_t.
        shared: Others that a gradient is wanted of.
        batch: Of this step.
        state: The loss's state.
        counts: Whether the gradient of what counts is wanted, if something else is learnt from.
    """
    leaves, others = forward_copy(fast), forward_copy(shared)
    with torch.enable_grad():
        found, aux, state = problem.loss({**problem.rest, **others, **leaves}, batch, detach(state))
        losses, learnt = TwoLosses.of(found)
        if learnt is losses:
            counted = inner_gradient(losses.sum(), {**others, **leaves})
            gradients = {name: counted[name] for name in leaves}
        else:
            _check_apart(problem.apart or not counts)
            gradients = inner_gradient(learnt.sum(), leaves, keep=counts)
            counted = inner_gradient(losses.sum(), {**others, **leaves}) if counts else {}
    # A copy: the mean of torch's own losses still holds the memory of all its terms.
    return InnerStep(losses.detach().clone(), gradients, counted, detach(aux), detach(state))


def _check_apart(apart: bool) -> None:
    if not apart:
        raise ValueError(
            "the loss says what counts and what is learnt from; expected an unroll that knows, "
            "found apart=False; do pass apart=True"
        )


def inner_gradient(
    loss: Tensor, leaves: Parameters, differentiable: bool = False, keep: bool = False
) -> Parameters:
    """Gradients of the loss to its leaves, zeros where it does not depend.

    Its graph is freed, unless it is to be kept, or the gradients are to be differentiable.
    """
    gradients = torch.autograd.grad(
        loss,
        list(leaves.values()),
        create_graph=differentiable,
        retain_graph=differentiable or keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, gradients, strict=True))


def weighted_sum(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """The meta-loss of losses ``[steps, rows]`` or ``[steps]``."""
    if len(set(weights)) == 1:  # a GPU writes them itself: nobody waits for a copy
        each = losses.new_full((len(weights),), weights[0])
    else:
        each = losses.new_tensor(weights)
    return losses.reshape(len(weights), -1).sum(1) @ each
