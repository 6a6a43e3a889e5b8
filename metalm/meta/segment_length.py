"""How many steps a checkpointed segment should have, from what one step was seen to keep.

Of T steps in segments of k, memory holds one checkpoint a segment (P bytes: fast weights, state of
the rule and of the loss) and the graph of one segment (A bytes a step):

    memory(k) = ceil(T / k) P + k A        least near k* = sqrt(T P / A), then 2 sqrt(T P A)

This is sqrt(T) only where A = P. Both are counted while the first step runs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metalm.meta import tree
from metalm.meta.inner_problem import InnerProblem, Unrolled


class Budget(NamedTuple):
    """The most that checkpoints and the graph of a segment may hold together."""

    bytes: int


Segment = int | Literal["auto"] | Budget
"""Steps of a segment; or "auto" for the number that needs least memory; or what it may need."""


class StepBytes(NamedTuple):
    """What one step of an unroll keeps, in bytes."""

    graph: int
    """A, until the backward pass has gone through the step; it is freed with its segment."""
    checkpoint: int
    """P, at the start of each segment."""

    def held(self, steps: int, segment: int) -> int:
        """Memory of so many steps in segments of this length."""
        return math.ceil(steps / segment) * self.checkpoint + segment * self.graph

    def least(self, steps: int) -> int:
        """The segment that holds least; of several, the longest."""
        if self.graph == 0:
            return steps
        root = math.sqrt(steps * self.checkpoint / self.graph)
        near = {min(max(length, 1), steps) for length in (math.floor(root), math.ceil(root))}
        return min(sorted(near, reverse=True), key=lambda length: self.held(steps, length))

    def within(self, steps: int, budget: Budget) -> int:
        """The longest segment that stays within a budget.

        Raises:
            ValueError: No segment does.
        """
        for length in range(steps, 0, -1):
            if self.held(steps, length) <= budget.bytes:
                return length
        best = self.least(steps)
        raise ValueError(
            f"{steps} steps do not fit into the budget; expected at most {budget.bytes} bytes, "
            f"found {self.held(steps, best)} with segments of {best} (a step keeps {self.graph} "
            f"bytes of graph, a checkpoint {self.checkpoint}); do take fewer steps or smaller "
            "batches, or raise the budget"
        )


def check_segment(segment: Segment) -> None:
    """Refuse what is no segment.

    Raises:
        ValueError: Fewer than one step, no byte, or another word than "auto".
    """
    if isinstance(segment, Budget):
        if segment.bytes < 1:
            raise ValueError(
                f"impossible budget; expected at least 1 byte, found {segment.bytes}; do change it"
            )
    elif isinstance(segment, str):
        if segment != "auto":
            raise ValueError(
                "unknown segment; expected a number of steps, 'auto' or a Budget, found "
                f"{segment!r}; do choose one"
            )
    elif segment < 1:
        raise ValueError(
            f"impossible segment; expected at least 1 update, found {segment}; do change it, or "
            "leave it out to keep everything"
        )


class Scales:
    """Weighs the steps of a method, as `run_segments` runs it."""

    def __init__(self) -> None:
        self.seen: StepBytes | None = None

    def weigh(self, problem: InnerProblem, method: Callable[[InnerProblem], Unrolled]) -> Unrolled:
        """Run the steps with a graph, note what they keep, and give the numbers alone."""
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
        steps = len(problem.batches)
        kept = sum(size for place, size in graph.items() if place not in known)
        # The first are a checkpoint; those of further steps are kept by the graph alone.
        places = _storages([fast])
        own = sum(size for place, size in graph.items() if place in places)
        self.seen = StepBytes(math.ceil(kept / steps) + own, sum(checkpoint.values()))
        return result._replace(
            meta_loss=result.meta_loss.detach(),
            fast=tree.detach(result.fast),
            rule_state=tree.detach(result.rule_state),
            state=tree.detach(result.state),
        )

    def length(self, segment: Segment, steps: int) -> int:
        """How long the segments of the steps that remain should be."""
        if isinstance(segment, int):
            return segment
        assert self.seen is not None
        if isinstance(segment, Budget):
            # The first checkpoint is there already.
            left = Budget(segment.bytes - self.seen.checkpoint)
            return self.seen.within(steps, left)
        return self.seen.least(steps)


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
