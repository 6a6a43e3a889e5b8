"""The step that most rules come down to, W <- W - s g + rho (W_0 - W), and its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.blocks import (
    Number,
    add_product,
    add_rows,
    blocks,
    number_of,
    rows_of,
    slice_of,
    zeros,
)


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
    rate = as_tensor(rate, weight)
    decay = None if decay is None else as_tensor(decay, weight)
    new: Tensor = _Step.apply(weight, gradient, slow, rate, decay)
    return new


def as_tensor(number: Number, like: Tensor) -> Tensor:
    """A number as a tensor of this dtype and device; a tensor stays the tensor it is."""
    return torch.as_tensor(number, dtype=like.dtype, device=like.device)


@torch.no_grad()
def write_step(
    new: Tensor,
    weight: Tensor,
    gradient: Tensor,
    slow: Tensor,
    rate: Number,
    decay: Number | None,
) -> None:
    """`step` without a derivative, into ``new``, which may be ``weight``; the same bits."""
    for block in blocks(slow):
        rate_block = number_of(rate, slow, block)
        decay_block = None if decay is None else number_of(decay, slow, block)
        for row in rows_of(weight, slow, block):
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
        write_step(new, weight, gradient, slow, rate, decay)
        to_rate, to_decay = ctx.needs_input_grad[3:]
        ctx.save_for_backward(
            gradient if to_rate else None,
            weight if to_decay else None,
            slow,
            decay,
        )
        ctx.rate_shape = rate.shape
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight, slow, decay = ctx.saved_tensors
        to_weight, _, to_slow, to_rate, to_decay = ctx.needs_input_grad
        from_rate = zeros(slow.shape, incoming) if to_rate else None
        from_slow = zeros(slow.shape, incoming) if to_slow and decay is not None else None
        from_decay = zeros(decay.shape, incoming) if to_decay else None
        out = None
        if to_weight and decay is not None:
            out = torch.empty(incoming.shape, dtype=incoming.dtype, device=incoming.device)
        for block in blocks(slow):
            keep = 1.0 if decay is None else number_of(1 - decay, slow, block)
            for row in rows_of(incoming, slow, block):
                part = incoming[row]
                if from_rate is not None:
                    add_product(from_rate[block], part, gradient[row], -1)
                if from_slow is not None:
                    add_rows(from_slow[block], part)
                if from_decay is not None:
                    away = torch.sub(slow[block], weight[row]).mul_(part)
                    target = slice_of(from_decay, slow, block)
                    target.add_(away.sum_to_size(target.shape))
                if out is not None:
                    torch.mul(part, keep, out=out[row])
        # Without decay dW_{t+1}/dW_t is the identity, and the incoming gradient passes untouched.
        if to_weight and out is None:
            out = incoming
        return (
            out,
            None,
            None if from_slow is None else from_slow.mul_(decay),
            None if from_rate is None else from_rate.sum_to_size(ctx.rate_shape),
            from_decay,
        )
