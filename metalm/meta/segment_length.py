"""How an unroll is cut into segments: by a length, or by what one step was seen to keep.

The graph of a step (A bytes) and a checkpoint (P bytes: fast weights, state of the rule and of the
loss) are counted while the first step runs; `checkpoint_schedule.py` has what follows from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metalm.meta import tree
from metalm.meta.checkpoint_schedule import (
    Every,
    Schedule,
    StepBytes,
    fitting,
    least_held,
)
from metalm.meta.inner_problem import InnerProblem, Unrolled


class Budget(NamedTuple):
    """The most that checkpoints and the graph of a segment may hold together."""

    bytes: int


Segment = int | Literal["auto", "least"] | Budget
"""Steps of a segment; or "auto" for the least memory with which two thirds of the steps are taken
again at most, which at second order costs a fifth to a quarter more time; or "least" for the least
memory with which they are taken again 4/3 times at most, on average; or the memory that there is,
for the fewest steps that are taken again."""

# How often, see `Segment`. A second-order step costs about three times what passing over it costs.
_PASSES = {"auto": 2 / 3, "least": 4 / 3}

# While the gradient goes through a step there are, beside the graph, that of the next W, that of
# its own, and at second order the direction of the second derivative. The first graph comes without
# them, so that a step of no more bytes finds room in it; if it is not that of a last loss alone.
_COMING = 3


def check_segment(segment: Segment) -> None:
    """Refuse what is no segment.

    Raises:
        ValueError: Fewer than one step, no byte, or another word than "auto" and "least".
    """
    if isinstance(segment, Budget):
        if segment.bytes < 1:
            raise ValueError(
                f"impossible budget; expected at least 1 byte, found {segment.bytes}; do change it"
            )
    elif isinstance(segment, str):
        if segment not in _PASSES:
            raise ValueError(
                "unknown segment; expected a number of steps, 'auto', 'least' or a Budget, found "
                f"{segment!r}; do choose one"
            )
    elif not isinstance(segment, int) or segment < 1:
        raise ValueError(
            f"impossible segment; expected at least 1 update, found {segment}; do change it, or "
            "leave it out to keep everything"
        )


def schedule_of(
    segment: Segment, problem: InnerProblem, method: Callable[[InnerProblem], Unrolled]
) -> Schedule:
    """How to take the updates.

    Args:
        segment: what the caller wants.
        problem: all steps; the first one is taken here to weigh it, unless a number was given.
        method: takes steps.

    Raises:
        ValueError: A budget that is too small.
    """
    updates = problem.updates
    if isinstance(segment, int):
        return Every(segment)
    if updates < 2:
        return Every(1)
    each = _weigh(problem.part(0, 1), method)
    if isinstance(segment, str):
        if updates * each.graph <= each.checkpoint:  # a cut would take more than it gives
            return Every(updates)
        spare = int(problem.update_last and each.graph <= _COMING * each.checkpoint)
        scored = scored_alone(segment, problem)
        held = least_held(updates, each, _PASSES[segment], spare, scored)
        return fitting(updates, each, held, spare, scored)
    least = least_held(updates, each, _PASSES["least"])
    if segment.bytes < least:
        raise ValueError(
            f"{updates} steps do not fit into the budget; expected at most {segment.bytes} bytes, "
            f"found {least} (a step keeps {each.graph} bytes of graph, a checkpoint "
            f"{each.checkpoint}); do take fewer steps or smaller batches, or raise the budget"
        )
    return fitting(updates, each, segment.bytes)


def scored_alone(segment: Segment, problem: InnerProblem) -> bool:
    """Whether the graph of a last batch that is only scored comes without that of any step.

    "auto" keeps the graphs of a third of the steps, the last ones, and does not take them again.
    """
    return segment != "auto" and not problem.update_last


def _weigh(problem: InnerProblem, method: Callable[[InnerProblem], Unrolled]) -> StepBytes:
    """What one step keeps, seen from one that is taken with its graph."""
    # From the second step on, fast weights do not share the memory of W_0.
    fast = {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in problem.fast.items()
    }
    problem = replace(problem, fast=fast)
    known = _storages(
        [
            problem.slow,
            problem.rest,
            problem.fast,
            problem.rule_state,
            problem.coefficients,
            problem.state,
            *problem.batches,
        ]
    )
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpack):
        result = method(problem)
        graph = _storages(saved.tensor for saved in alive)
    checkpoint = _storages([result.fast, result.rule_state, result.state])
    kept = sum(size for place, size in graph.items() if place not in known)
    # The first are those of the caller; those of further steps are kept by the graph alone.
    places = _storages([fast])
    own = sum(size for place, size in graph.items() if place in places)
    return StepBytes(kept + own, sum(checkpoint.values()))


class _Saved:
    """A tensor that a graph keeps; it lives as long as the graph."""

    def __init__(self, tensor: Tensor) -> None:
        # Autograd knows the history; with it, the graph would hold itself.
        self.tensor = tensor.detach()

    def unpack(self) -> Tensor:
        return self.tensor


def _storages(trees: Iterable[Any]) -> dict[int, int]:
    """Bytes of the memory behind these tensors, by its address."""
    found: dict[int, int] = {}
    for tensor in tree.tensors(list(trees)):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found
