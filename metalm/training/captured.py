"""A function whose kernels a GPU is told once for each shape, and then does again and again.

A step of training is a thousand small kernels and more, each of which takes the processor longer to
launch than the GPU to run. A CUDA graph launches all of them at once (`torch.cuda.CUDAGraph`): it
repeats what the function did while it was captured, on the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

_log = logging.getLogger(__name__)

_WARM_UP = 2
"""Calls before the first capture, in which libraries set themselves up."""


class _Graph(NamedTuple):
    """What was captured for some shapes."""

    graph: torch.cuda.CUDAGraph
    taken: tuple[Tensor, ...]
    """Where it reads its arguments."""
    given: tuple[Tensor, ...]
    """Where it writes its results."""


class Captured:
    """A function of tensors on a GPU, captured for each shape that its arguments come in.

    What cannot be captured is done as it stands from then on, with a warning.

    Args:
        function: reads and writes, beside its arguments and results, only memory that stays where
            it is, such as parameters and their gradients, and never asks what a number is. Random
            numbers go on from call to call as they do without a graph.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()
        self._failed = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, in memory of the caller's own."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._graphs and not self._failed:
            try:
                self._graphs[shapes] = self._capture(tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._failed = True
                self._graphs.clear()
                what = " ".join(str(error).splitlines()[:2])
                _log.warning(
                    "no CUDA graph of this computation, which goes on without: the same results, "
                    "more slowly (%s)",
                    what,
                )
        if self._failed:
            return self.function(*tensors)
        graph, taken, given = self._graphs[shapes]
        for place, tensor in zip(taken, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        # The graphs share the memory of all that is between, which the next one writes over.
        return tuple(tensor.clone() for tensor in given)

    def _capture(self, tensors: tuple[Tensor, ...]) -> _Graph:
        """On a stream of its own, as CUDA demands."""
        taken = tuple(tensor.detach().clone() for tensor in tensors)
        graph = torch.cuda.CUDAGraph()
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            for _ in range(0 if self._graphs else _WARM_UP):
                self.function(*taken)
            graph.capture_begin(pool=self._pool)
            try:
                given = self.function(*taken)
            except BaseException:
                with suppress(RuntimeError):  # that it failed is known
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._aside)
        return _Graph(graph, taken, given)
