"""A function whose kernels a GPU is told once for each shape, and then does again and again.

A step of training is a thousand small kernels and more, each of which takes the processor longer to
launch than the GPU to run. A CUDA graph launches all of them at once (`torch.cuda.CUDAGraph`): it
repeats what the function did while it was captured, on the same memory.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

_log = logging.getLogger(__name__)

NO_GRAPHS = "METALM_NO_GRAPHS"
"""Variable of the environment; where it is set, nothing is captured."""

_WARM_UP = 2
"""Calls before the first capture, in which libraries set themselves up."""


def _aside() -> torch.cuda.Stream:
    """A stream of its own, as CUDA demands."""
    return _stream(torch.cuda.current_device())


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all that is captured on a device, since libraries keep memory for each."""
    return torch.cuda.Stream(device)


class _Graph(NamedTuple):
    """What was captured for some shapes."""

    graph: torch.cuda.CUDAGraph
    taken: tuple[Tensor, ...]
    """Where it reads its arguments."""
    given: tuple[Tensor, ...]
    """Where it writes its results."""


class Captured:
    """A function of tensors on a GPU, captured for each shape that its arguments come in.

    What cannot be captured is done as it stands from then on, with a warning. Torch up to 2.11 does
    not always recover from a capture that failed; `NO_GRAPHS` spares it the attempt.

    Args:
        function: reads and writes, beside its arguments and results, only memory that stays where
            it is, such as parameters and their gradients, and never asks what a number is. Random
            numbers go on from call to call as they do without a graph.
        patience: calls of a shape that are done as they stand before it is captured, which takes as
            long as a few.
    """

    def __init__(self, function: Function, patience: int = 0) -> None:
        self.function, self.patience = function, patience
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self._failed = bool(os.environ.get(NO_GRAPHS))

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, in memory of the caller's own."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if self._failed:
            return self.function(*tensors)
        if shapes not in self._graphs:
            early = self._calls.total() < _WARM_UP or self._calls[shapes] < self.patience
            self._calls[shapes] += 1
            if early or not self._capture(shapes, tensors):
                return self._as_it_stands(tensors)
        graph, taken, given = self._graphs[shapes]
        for place, tensor in zip(taken, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        # The graphs share the memory of all that is between, which the next one writes over.
        return tuple(tensor.clone() for tensor in given)

    def release(self) -> None:
        """Gives back the memory of all that was captured."""
        if self._graphs:
            self._graphs.clear()
            torch.cuda.empty_cache()

    def _as_it_stands(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """On the stream that it will be captured on, for which libraries set themselves up."""
        _aside().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(_aside()):
            given = self.function(*tensors)
        torch.cuda.current_stream().wait_stream(_aside())
        return given

    def _capture(self, shapes: tuple[torch.Size, ...], tensors: tuple[Tensor, ...]) -> bool:
        """Captures the function; whether that was possible."""
        try:
            self._graphs[shapes] = self._captured(tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._failed = True
            self._graphs.clear()
            what = " ".join(str(error).splitlines()[:2])
            _log.warning(
                "no CUDA graph of this computation, which goes on without: the same results, "
                "more slowly; should it fail, start again with %s=1 (%s)",
                NO_GRAPHS,
                what,
            )
        return not self._failed

    def _captured(self, tensors: tuple[Tensor, ...]) -> _Graph:
        taken = tuple(tensor.detach().clone() for tensor in tensors)
        torch.cuda.empty_cache()  # what was done as it stood has left memory that no graph can use
        graph = torch.cuda.CUDAGraph()
        _aside().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(_aside()):
            graph.capture_begin(pool=self._pool)
            try:
                given = self.function(*taken)
            except BaseException:
                with suppress(RuntimeError):  # that it failed is known
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(_aside())
        return _Graph(graph, taken, given)


def clear_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Puts zeros into gradients, which stay where they are, as a captured function needs it."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()
