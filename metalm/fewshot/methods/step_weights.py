"""The queries counted after every update: the multi-step loss of Antoniou et al. 2019.

J = sum_t w_t l(W_t; queries), t from 1 to the number of updates; section 4, equation 4 of "How to
train your MAML" (arXiv 1810.09502). Each W_t comes from the support set alone. The paper moves the
weights to the last update as training goes on; here they stay as they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from metalm.meta.inner_problem import TwoLosses

Batch = Any


class CountedStep(NamedTuple):
    """The batch of an update before which the queries are counted."""

    support: Batch
    """What the update learns from."""
    query: Batch
    """What counts."""


def share_of_each_step(step_weights: Sequence[float], steps: int) -> list[float]:
    """What the query loss weighs at W_0, ..., W_steps; without weights the last alone counts.

    Args:
        step_weights: one for each of W_1, ..., W_steps, or none.
        steps: updates.

    Raises:
        ValueError: weights of another number, one that is not finite or below 0, or nothing at the
            last, which would be an update for nothing.
    """
    if not step_weights:
        return [0.0] * steps + [1.0]
    found = " ".join(f"{weight:g}" for weight in step_weights)
    if len(step_weights) != steps:
        raise ValueError(
            f"step weights do not fit the updates; expected {steps}, one for each update, found "
            f"{len(step_weights)} ({found}); do give as many, or none to count the last alone"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in step_weights):
        raise ValueError(
            f"impossible step weights; expected finite numbers of at least 0, found {found}; do "
            "change them"
        )
    if not step_weights[-1] > 0:
        raise ValueError(
            f"the last update would not count; expected its step weight above 0, found {found}; do "
            "raise it, or take fewer updates"
        )
    return [0.0, *step_weights]


def counting_queries(loss: Callable[[Any, Batch], Any]) -> Callable[[Any, Any], Any]:
    """A task's loss that counts the queries of a `CountedStep`, and learns from its support set.

    The queries leave no trace in running statistics there: those are of the support set, and of the
    queries after the last update, whatever the weights.

    Args:
        loss: called with a fork of one task and one batch; gives a scalar and what is to be kept.
    """

    def both(model: Any, batch: Any) -> tuple[Tensor | TwoLosses, Any]:
        if not isinstance(batch, CountedStep):
            return loss(model, batch)
        aside = model.with_numbers({**model.rest, **model.fast}, model.buffers)
        counted, kept = loss(aside, batch.query)
        learnt, _ = loss(model, batch.support)
        return TwoLosses(counted, learnt), kept

    return both
