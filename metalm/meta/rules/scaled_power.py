"""c (r + eps)^(-p) in few passes over memory, forth and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_power(base: Tensor, eps: Tensor, exponent: Tensor, factor: Tensor) -> Tensor:
    """Give c (r + eps)^(-p), differentiable in eps, p and c.

    Plain tensor operations take three times as long, since the derivative of a power is two more.

    Args:
        base: r, ``[*shape]``, r + eps > 0.
        eps: scalar.
        exponent: p, scalar.
        factor: c, broadcastable to ``[*shape]``.

    Returns:
        ``[*shape]``.
    """
    power: Tensor = _ScaledPower.apply(base, eps, exponent, factor)
    return power


class _ScaledPower(torch.autograd.Function):
    # Nothing of this size is kept: it would be there until the end of the backward pass, and to
    # work it out again costs little beside the unroll that lies between.

    @staticmethod
    def forward(ctx: Any, base: Tensor, eps: Tensor, exponent: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(base, eps, exponent, factor)
        return _power((base + eps).log_(), exponent).mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        base, eps, exponent, factor = ctx.saved_tensors
        logarithm = (base + eps).log_()
        product = _power(logarithm, exponent).mul_(incoming)
        to_factor = product.sum_to_size(factor.shape)
        product = product * factor
        to_exponent = -torch.dot(product.flatten(), logarithm.flatten())
        inverse = logarithm.neg_().exp_()
        to_eps = -exponent * torch.dot(product.flatten(), inverse.flatten())
        return None, to_eps, to_exponent, to_factor


def _power(logarithm: Tensor, exponent: Tensor) -> Tensor:
    return (logarithm * -exponent).exp_()
