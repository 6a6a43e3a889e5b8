"""One small network over very many coordinates, a chunk at a time, forth and back.

A network with h features holds h numbers and more for each of millions of coordinates. Here they
live for one chunk only: the forward pass keeps the operands and nothing else, and the backward pass
takes each chunk once more, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Operands(NamedTuple):
    """What a chunk function sees: its part of the first two, and all of the third."""

    stacked: Sequence[Tensor]
    """Each ``[rows, units, ...]``: fast weights, gradients, states."""
    flat: Sequence[Tensor]
    """Each ``[units, ...]``: slow weights and what else all rows share."""
    shared: Sequence[Tensor]
    """Of any shape: the network's parameters, and what holds for a whole row."""


ChunkFunction = Callable[[Operands], tuple[tuple[Tensor, ...], Tensor]]
"""operands -> (outputs ``[rows, units, ...]``, a total over units ``[rows, ...]``)."""


def in_chunks(
    function: ChunkFunction,
    operands: Operands,
    size: int,
    into: Sequence[Tensor] = (),
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Call a function on chunks of units, as if it had been called on all of them at once.

    Args:
        function: Treats every unit alike and by itself. Its outputs are differentiable to all
            operands; the total is not.
        operands: What it is called with.
        size: Units in a chunk, at least 1.
        into: Tensors that the first outputs are written into. They may be operands; there is then
            no derivative.

    Returns:
        The outputs, and the sum of the totals over chunks.
    """
    tensors = [tensor for kind in operands for tensor in kind]
    chunks = _Chunks(function, len(operands.stacked), len(operands.flat), max(1, size))
    if into:
        with torch.no_grad():
            return chunks.run(tensors, into)
    *outputs, total = _InChunks.apply(chunks, *tensors)
    return tuple(outputs), total


@dataclass(frozen=True)
class _Chunks:
    """A chunk function, and how the list of its operands is cut."""

    function: ChunkFunction
    num_stacked: int
    num_flat: int
    size: int

    def ranges(self, tensors: Sequence[Tensor]) -> list[slice]:
        """Where each chunk begins and ends."""
        units = tensors[0].shape[1]
        return [slice(at, min(at + self.size, units)) for at in range(0, units, self.size)]

    def cut(self, tensors: Sequence[Tensor], part: slice) -> list[Tensor]:
        """A chunk's views of the operands, or of what is shaped like them."""
        num_cut = self.num_stacked + self.num_flat
        return [
            *(tensor[:, part] for tensor in tensors[: self.num_stacked]),
            *(tensor[part] for tensor in tensors[self.num_stacked : num_cut]),
            *tensors[num_cut:],
        ]

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The function of one chunk."""
        num_cut = self.num_stacked + self.num_flat
        return self.function(
            Operands(
                tensors[: self.num_stacked], tensors[self.num_stacked : num_cut], tensors[num_cut:]
            )
        )

    def run(
        self, tensors: Sequence[Tensor], into: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """All chunks, without a graph."""
        units = tensors[0].shape[1]
        outputs: list[Tensor] = []
        totals: list[Tensor] = []
        for part in self.ranges(tensors):
            new, total = self.call(self.cut(tensors, part))
            if not outputs:
                outputs = [
                    into[i] if i < len(into) else one.new_empty(len(one), units, *one.shape[2:])
                    for i, one in enumerate(new)
                ]
            for output, one in zip(outputs, new, strict=True):
                output[:, part] = one
            totals.append(total)
        return tuple(outputs), torch.stack(totals).sum(0)


class _InChunks(torch.autograd.Function):
    """(chunks, all operands) -> (outputs, total)."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.chunks = chunks
        ctx.save_for_backward(*tensors)
        outputs, total = chunks.run(tensors, ())
        ctx.mark_non_differentiable(total)
        return *outputs, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        chunks, tensors = ctx.chunks, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        asked = [(i, new) for i, new in enumerate(incoming[:-1]) if new is not None]
        # What nobody asked for stands for itself, so that all lists are cut alike.
        reached = [
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if want else tensor
            for tensor, want in zip(tensors, wanted, strict=True)
        ]
        for part in chunks.ranges(tensors) if asked else ():
            leaves = [
                tensor.detach().requires_grad_(want)
                for tensor, want in zip(chunks.cut(tensors, part), wanted, strict=True)
            ]
            with torch.enable_grad():
                outputs, _ = chunks.call(leaves)
            found = iter(
                torch.autograd.grad(
                    [outputs[i] for i, _ in asked],
                    [leaf for leaf in leaves if leaf.requires_grad],
                    [gradient[:, part] for _, gradient in asked],
                    materialize_grads=True,
                )
            )
            for total, want in zip(chunks.cut(reached, part), wanted, strict=True):
                if want:
                    total += next(found)
        return None, *(total if want else None for total, want in zip(reached, wanted, strict=True))
