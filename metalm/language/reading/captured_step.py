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


class Steps:
    """The steps of a reading.

    Args:
        step: what is done; where it is captured it asks nowhere what a number is.
        captured: whether it is, for the rows that are read just now.
    """

    def __init__(self, step: Step, *, captured: bool) -> None:
        self._step, self._is_captured = step, captured
        self._now: _CapturedStep | None = None

    def __call__(self, batch: SegmentBatch, memory: Memory) -> Stepped:
        """One step; the tensors that it gives are the caller's own."""
        if not self._is_captured:
            return self._step(batch, memory)
        if self._now is None or self._now.memory is not memory:
            self.release()
            self._now = _CapturedStep(self._step, memory)
        return self._now(batch)

    def release(self) -> None:
        """Gives back the memory of the graphs."""
        if self._now is not None:
            self._now.release()
            self._now = None


class _CapturedStep:
    """A step of one memory, whose tensors all stay where they are.

    Args:
        step: what is done.
        memory: of the rows.
    """

    def __init__(self, step: Step, memory: Memory) -> None:
        self.memory = memory
        self._step = step
        self._captured = Captured(self._in_place, PATIENCE)
        self._last: Stepped | None = None

    def __call__(self, batch: SegmentBatch) -> Stepped:
        found = self._captured(*batch)
        assert self._last is not None
        stepped: Stepped = tree.replace(self._last, list(found))
        return stepped

    def release(self) -> None:
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
