"""Order 0: losses and updates, and no meta-gradient."""

from __future__ import annotations

import torch

from metalm.meta.inner_problem import (
    InnerProblem,
    TwoLosses,
    Unrolled,
    inner_step,
    weighted_sum,
)
from metalm.meta.tree import detach


@torch.no_grad()
def plain_steps(problem: InnerProblem) -> Unrolled:
    """Adapt only: no meta-gradient, nothing kept."""
    fast, rule_state, state = problem.fast, problem.rule_state, problem.state
    losses, aux = [], []
    for batch, _, learns in problem.steps():
        if not learns:
            found, kept, state = problem.loss({**problem.rest, **fast}, batch, detach(state))
            losses.append(TwoLosses.of(found).counted)
            aux.append(kept)
            break
        taken = inner_step(problem, fast, {}, batch, state, counts=False)
        losses.append(taken.losses)
        aux.append(taken.aux)
        state = taken.state
        rule_state = problem.rule.observe(rule_state, taken.losses, taken.aux)
        update = (fast, taken.gradients, problem.slow, rule_state, problem.coefficients)
        if problem.overwrite:
            rule_state = problem.rule.update_(*update)
        else:
            fast, rule_state = problem.rule(*update)
    stacked = torch.stack(losses)
    return Unrolled(weighted_sum(stacked, problem.weights), stacked, aux, fast, rule_state, state)
