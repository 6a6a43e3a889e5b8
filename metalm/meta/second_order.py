"""Second order: the exact meta-gradient, through the inner gradients and the loss's own state.

    lambda_t = w_t g_t + (dW_{t+1}/dW_t + dW_{t+1}/dg_t H_t)^T lambda_{t+1}

H_t is the Hessian of l_t (the terms of the states are left out here). Autograd forms these products
from a graph of each inner gradient, so the loss must be twice differentiable. The state that the
loss carries from step to step keeps its history inside an unroll; each g_t is still the gradient of
l_t alone, with that state held fixed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalm.meta.fork import forward_copy, rebase
from metalm.meta.inner_problem import InnerProblem, TwoLosses, Unrolled, inner_gradient
from metalm.meta.plain_steps import plain_steps
from metalm.meta.step_rule import AbstractStepRule
from metalm.meta.tree import detach


def exact_steps(problem: InnerProblem) -> Unrolled:
    """Second order for any rule; without grad mode only the numbers, in little memory."""
    # The fused kernels of attention have no second derivative; with and without a graph the numbers
    # must be the same.
    with sdpa_kernel(SDPBackend.MATH):
        if torch.is_grad_enabled():
            return _graph(problem)
        if isinstance(problem.rule, AbstractStepRule):  # in place they take the same steps, quicker
            own = {name: weight.clone() for name, weight in problem.fast.items()}
            problem = replace(problem, fast=own, overwrite=True)
        return plain_steps(problem)


def _graph(problem: InnerProblem) -> Unrolled:
    fast, rule_state, state = problem.fast, problem.rule_state, problem.state
    if problem.truncated:
        fast = rebase(fast, problem.slow)
    losses, aux, terms = [], [], []
    for batch, weight, learns in problem.steps():
        # The loss is taken on the backward copies; where nothing leads to them they are leaves.
        leaves = {name: tensor for name, tensor in fast.items() if not tensor.requires_grad}
        fast = {**fast, **forward_copy(leaves)}
        found, kept, state = problem.loss({**problem.rest, **fast}, batch, state)
        step_losses, learnt = TwoLosses.of(found)
        total = step_losses.sum()
        losses.append(step_losses.detach().clone())
        aux.append(detach(kept))
        if weight:
            terms.append(total if weight == 1 else total * weight)
        if not learns:
            break
        apart = learnt is not step_losses
        gradients = inner_gradient(learnt.sum() if apart else total, fast, differentiable=True)
        rule_state = problem.rule.observe(rule_state, step_losses, aux[-1])
        fast, rule_state = problem.rule(
            fast, gradients, problem.slow, rule_state, problem.coefficients
        )
    meta_loss = torch.stack(terms).sum() if terms else losses[0].new_zeros(())
    return Unrolled(meta_loss, torch.stack(losses), aux, fast, rule_state, state)
