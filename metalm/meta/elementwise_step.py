"""The step that most rules come down to, W <- W - s g + rho (W_0 - W), in few passes over memory.

Fast weights have a copy for each row and live in main memory, while one copy of W_0, s and rho
fits the cache. So the work goes block by block of the coordinates, all rows of a block together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Measured: blocks of 2^15 to 2^17 numbers are equally fast on a CPU with 1 MiB of L2 a core; a GPU
# has bandwidth to spare and pays for each launch, so there one block takes everything.
_BLOCK = 2**16


Number = Tensor | float


def step(
    weight: Tensor, gradient: Tensor, slow: Tensor, rate: Number, decay: Number | None
) -> Tensor:
    """W - s g + rho (W_0 - W), differentiable in W, W_0, s and rho; g is a constant.

    Args:
        weight: W, ``[*shape]`` or ``[rows, *shape]``.
        gradient: g, like ``weight``.
        slow: W_0, ``[*shape]``.
        rate: s, broadcastable to ``[*shape]``.
        decay: rho, broadcastable to ``[*shape]``; None for no decay.

    Returns:
        A new tensor like ``weight``.
    """
    rate = torch.as_tensor(rate, dtype=weight.dtype, device=weight.device)
    if decay is not None:
        decay = torch.as_tensor(decay, dtype=weight.dtype, device=weight.device)
    new: Tensor = _Step.apply(weight, gradient, slow, rate, decay)
    return new


@torch.no_grad()
def step_(
    weight: Tensor, gradient: Tensor, slow: Tensor, rate: Number, decay: Number | None
) -> None:
    """The same step written into ``weight``, the same numbers bit for bit."""
    _write(weight, weight, gradient, slow, rate, decay)


def _write(
    new: Tensor, weight: Tensor, gradient: Tensor, slow: Tensor, rate: Number, decay: Number | None
) -> None:
    """The step into ``new``, which may be ``weight`` itself."""
    stacked = weight.dim() > slow.dim()
    for block in _blocks(slow):
        rate_block = _part(rate, slow, block)
        decay_block = None if decay is None else _part(decay, slow, block)
        for row in _rows(weight, stacked, block):
            target, current = new[row], weight[row]
            if decay_block is not None:
                torch.lerp(current, slow[block].expand_as(current), decay_block, out=target)
                current = target
            if isinstance(rate_block, Tensor):
                torch.addcmul(current, rate_block, gradient[row], value=-1, out=target)
            else:
                torch.sub(current, gradient[row], alpha=rate_block, out=target)


class _Step(torch.autograd.Function):
    """`step`; gradients of s, rho and W_0 are summed over rows without a [rows, *shape] tensor."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gradient: Tensor, slow: Tensor, rate: Tensor, decay: Tensor | None
    ) -> Tensor:
        new = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        _write(new, weight, gradient, slow, rate, decay)
        to_rate, to_decay = ctx.needs_input_grad[3:]
        ctx.save_for_backward(
            gradient if to_rate else None,
            weight if to_decay else None,
            slow if to_decay else None,
            decay,
        )
        ctx.slow_shape, ctx.rate_shape = slow.shape, rate.shape
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight, slow, decay = ctx.saved_tensors
        to_weight, _, to_slow, to_rate, to_decay = ctx.needs_input_grad
        stacked = incoming.dim() > len(ctx.slow_shape)
        like = incoming[0] if stacked else incoming
        to_slow = to_slow and decay is not None
        from_rate = (
            torch.zeros_like(like, memory_format=torch.contiguous_format) if to_rate else None
        )
        from_slow = (
            torch.zeros_like(like, memory_format=torch.contiguous_format) if to_slow else None
        )
        from_decay = torch.zeros_like(decay) if to_decay else None
        # Without decay dW_{t+1}/dW_t is the identity: the incoming gradient passes untouched.
        passes = decay is None or not to_weight
        out = incoming if passes else torch.empty_like(incoming)
        if passes and from_rate is None and from_slow is None and from_decay is None:
            return (out if to_weight else None), None, None, None, None
        for block in _blocks(like):
            keep = None if passes else 1 - _part(decay, like, block)
            for row in _rows(incoming, stacked, block):
                part = incoming[row]
                if from_rate is not None:
                    _subtract_product(from_rate[block], part, gradient[row])
                if from_slow is not None:
                    from_slow[block].add_(part.sum_to_size(from_slow[block].shape))
                if from_decay is not None:
                    away = torch.sub(slow[block], weight[row]).mul_(part)
                    target = _slice(from_decay, like, block)
                    target.add_(away.sum_to_size(target.shape))
                if keep is not None:
                    torch.mul(part, keep, out=out[row])
        return (
            out if to_weight else None,
            None,
            None if from_slow is None else from_slow.mul_(decay),
            None if from_rate is None else from_rate.sum_to_size(ctx.rate_shape),
            from_decay,
        )


def _subtract_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write target - left * right to target, summed over rows if they have a dimension more."""
    if left.dim() == target.dim():
        target.addcmul_(left, right, value=-1)
    else:
        target.sub_((left * right).sum(0))


Index = tuple[Any, ...]


def _blocks(slow: Tensor) -> Iterator[Index]:
    """Indices of [*shape] that cut its first dimension into blocks."""
    if slow.dim() == 0 or slow.device.type != "cpu":
        yield (...,)
        return
    length = slow.shape[0]
    size = max(1, _BLOCK * length // max(1, slow.numel()))
    for start in range(0, length, size):
        yield (slice(start, min(start + size, length)),)


def _rows(weight: Tensor, stacked: bool, block: Index) -> Iterator[Index]:
    """Indices of this block in every row of [rows, *shape], or in [*shape]."""
    if not stacked:
        yield block
    elif weight.device.type != "cpu":
        yield (slice(None),)
    else:
        for row in range(weight.shape[0]):
            yield (row, *block)


def _slice(tensor: Tensor, slow: Tensor, block: Index) -> Tensor:
    """The block of a tensor that broadcasts to [*shape]."""
    if tensor.dim() < max(1, slow.dim()) or tensor.shape[0] == 1 != slow.shape[0]:
        return tensor
    return tensor[block]


def _part(number: Number, slow: Tensor, block: Index) -> Number:
    """The block in the form that the elementwise kernels are fast with: a float, or all of it."""
    if not isinstance(number, Tensor) or slow.device.type != "cpu":
        return number if not isinstance(number, Tensor) else _slice(number, slow, block)
    if number.numel() == 1:
        return number.item()
    return _slice(number, slow, block).expand_as(slow[block]).contiguous()
