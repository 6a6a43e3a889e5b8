"""Blocks of coordinates, so that elementwise work on many rows stays in a CPU's cache.

Fast weights have a copy for each row and live in main memory, while the block of W_0, of the step
sizes and of the sums over rows fits the cache. So a block's rows are worked on one after the other
before the next block begins. A GPU pays for each launch instead: there one block is everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Measured on a CPU with 1 MiB of L2 and 16 MiB of L3 a core: 2^17 is the fastest of 2^13 to 2^21,
# since smaller ones pay for Python and larger ones leave the cache.
BLOCK_NUMBERS = 2**17

Number = Tensor | float
Index = tuple[Any, ...]


def by_rows(tensor: Tensor) -> bool:
    """Whether work on this tensor's device goes by blocks and rows."""
    return tensor.device.type == "cpu"


def blocks(slow: Tensor) -> Iterator[Index]:
    """Indices of ``[*shape]`` that cut its first dimension into blocks."""
    if slow.dim() == 0 or not by_rows(slow):
        yield (...,)
        return
    length = slow.shape[0]
    size = max(1, BLOCK_NUMBERS * length // max(1, slow.numel()))
    for start in range(0, length, size):
        yield (slice(start, min(start + size, length)),)


def rows_of(weight: Tensor, slow: Tensor, block: Index) -> Iterator[Index]:
    """Indices of the block in each row of ``[rows, *shape]``, or in ``[*shape]`` itself."""
    if weight.dim() == slow.dim():
        yield block
    elif not by_rows(weight):
        yield (slice(None),)
    else:
        for row in range(weight.shape[0]):
            yield (row, *block)


def slice_of(tensor: Tensor, slow: Tensor, block: Index) -> Tensor:
    """The block of a tensor that broadcasts to ``[*shape]``."""
    if tensor.dim() < max(1, slow.dim()) or tensor.shape[0] == 1 != slow.shape[0]:
        return tensor
    return tensor[block]


def number_of(number: Number, slow: Tensor, block: Index) -> Number:
    """The block of a step size in the form that kernels are fast with: a float, or all of it."""
    if not isinstance(number, Tensor):
        return number
    if not by_rows(slow):
        return slice_of(number, slow, block)
    if number.numel() == 1:
        return number.item()
    return slice_of(number, slow, block).expand_as(slow[block]).contiguous()


def add_product(target: Tensor, left: Tensor, right: Tensor, value: float) -> None:
    """Add value * left * right to target, summed over rows where they have a dimension more."""
    if left.dim() == target.dim():
        target.addcmul_(left, right, value=value)
    else:
        target.add_((left * right).sum(0), alpha=value)


def add_rows(target: Tensor, part: Tensor) -> None:
    """Add to target, summed over rows where there is a dimension more."""
    target.add_(part if part.dim() == target.dim() else part.sum(0))


def zeros(shape: torch.Size, like: Tensor) -> Tensor:
    """Contiguous zeros of a dtype and device."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
