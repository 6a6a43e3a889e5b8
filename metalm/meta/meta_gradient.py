"""How the meta-gradient runs through an inner gradient.

First order: g_t is a constant of the rule, and dl_t/dW_t is that same g_t, which the inner step has
already computed. Second order and forward mode have their place here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.parameters import Parameters

ORDERS = (0, 1)
"""0: adapt only, no meta-gradient. 1: the inner gradient is a constant."""


def check_order(order: int) -> None:
    """Refuse an order of the meta-gradient that does not exist."""
    if order not in ORDERS:
        raise ValueError(
            f"no meta-gradient of order {order}; expected 0 (none) or 1 (first order, which is "
            f"what exists), found {order}; do use order=1"
        )


def inner_gradient(loss: Tensor, leaves: Parameters) -> Parameters:
    """Gradients of the loss to its leaves, zeros where it does not depend; frees its graph."""
    names = list(leaves)
    gradients = torch.autograd.grad(
        loss, [leaves[name] for name in names], allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, gradients, strict=True))


def attach(loss: Tensor, gradients: Parameters, copies: Parameters) -> Tensor:
    """The loss as a number on the graph of the backward copies, with g as its known gradient.

    Args:
        loss: Scalar; its own graph is not used.
        gradients: d loss / d forward copy, by name.
        copies: Backward copies of the same names.

    Returns:
        A scalar equal to ``loss`` whose gradient to each copy is the given one.
    """
    names = list(copies)
    attached: Tensor = _Attach.apply(
        loss.detach(),
        len(names),
        *(gradients[name] for name in names),
        *(copies[name] for name in names),
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
        gradients = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 + ctx.num :]
        return (
            None,
            None,
            *(None,) * ctx.num,
            *(scale * g if need else None for g, need in zip(gradients, needs, strict=True)),
        )
