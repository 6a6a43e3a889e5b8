"""A number whose gradients are already known, put on the graph without a pass of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.parameters import Parameters


def attach(loss: Tensor, gradients: Parameters, copies: Parameters) -> Tensor:
    """A loss as a number on the graph of what it depends on, with its known gradients.

    Args:
        loss: Scalar; its own graph is not used.
        gradients: d loss / d tensor, by name.
        copies: Those tensors on the graph (the backward copies of the fast weights, say), under the
            same names.

    Returns:
        A scalar equal to ``loss`` whose gradient to each copy is the given one.
    """
    attached: Tensor = _Attach.apply(
        loss.detach(),
        len(copies),
        *(gradients[name] for name in copies),
        *copies.values(),
    )
    return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, num: int, *tensors: Tensor) -> Tensor:
        ctx.num = num
        ctx.save_for_backward(*tensors[:num])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2 + ctx.num :]
        reached = (
            scale * gradient if need else None
            for gradient, need in zip(ctx.saved_tensors, needs, strict=True)
        )
        return (None, None, *(None,) * ctx.num, *reached)
