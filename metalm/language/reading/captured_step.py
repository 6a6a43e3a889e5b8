"""The step of one batch of rows as a CUDA graph: scored and learnt from without being launched.

A segment is some five hundred small kernels, which take a processor ten times longer to launch than
a GPU to run where few rows are read, as one row is in the carry-on mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from metalm.language.network.segment_loss import SegmentScore
from metalm.language.reading.standing import Memory
from metalm.language.text.article_batches import SegmentBatch
from metalm.meta import tree
from metalm.training.captured import Captured

PATIENCE = 8
"""Steps of a batch before it is captured, which takes as long as some."""


class Stepped(NamedTuple):
    """What a step gives, beside what it leaves in the memory."""

    score: SegmentScore
    """Of the segment, before anything was learnt from it."""
    lost: Tensor | None
    """Which rows lost their way, bool [rows]; None where nothing is learnt."""


Step = Callable[[SegmentBatch, Memory], Stepped]
"""Scores a segment and learns from it; what the memory held may be written over or replaced."""


class CapturedStep:
    """A step of one memory, whose tensors all stay where they are.

    Args:
        step: what is done; asks nowhere what a number is.
        memory: of the rows.
    """

    def __init__(self, step: Step, memory: Memory) -> None:
        self.memory = memory
        self._step = step
        self._captured = Captured(self._in_place, PATIENCE)
        self._last: Stepped | None = None

    def __call__(self, batch: SegmentBatch) -> Stepped:
        """One step; the tensors that it gives are the caller's own."""
        found = self._captured(*batch)
        assert self._last is not None
        stepped: Stepped = tree.replace(self._last, list(found))
        return stepped

    def release(self) -> None:
        """Gives back the memory of the graphs."""
        self._last = None
        self._captured.release()

    def _in_place(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        after = replace(self.memory)
        self._last = self._step(SegmentBatch(inputs, targets, mask), after)
        for name in ("fast", "rule_state", "state"):
            here, there = getattr(self.memory, name), getattr(after, name)
            if here is not there:
                tree.write(here, there)
        return tuple(tree.tensors(self._last))
