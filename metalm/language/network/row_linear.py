"""A linear layer whose weights the rows of a batch share, or of which each row has its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metalm.language.network.products import (
    product,
    product_and_bias,
    product_type,
    without_autocast,
)


def row_linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b at every time step of every row.

    Args:
        values: [time, rows, inputs].
        weight: [outputs, inputs], or [rows, outputs, inputs].
        bias: [outputs], or [rows, outputs].

    Returns:
        [time, rows, outputs].
    """
    if weight.dim() == 2 and bias.dim() == 1:
        return torch.nn.functional.linear(values, weight, bias)
    rows_first = values.transpose(0, 1)
    if weight.dim() == 2:
        return (rows_first @ weight.t() + bias.unsqueeze(1)).transpose(0, 1)
    if bias.dim() == 1:
        bias = bias.expand(weight.shape[0], -1)
    found: Tensor = _RowLinear.apply(product_type(values), rows_first.to(bias.dtype), weight, bias)
    return found.transpose(0, 1)


class _RowLinear(torch.autograd.Function):
    """[rows, time, inputs] to [rows, time, outputs] with a weight and a bias per row.

    Autograd would form the weight's gradient transposed, and whoever uses it next would pay for a
    strided copy of `rows x outputs x inputs`.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, dtype: torch.dtype, values: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        converted = weight.to(dtype)
        ctx.save_for_backward(values, weight, converted)
        return product_and_bias(values, converted.transpose(1, 2), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, converted = ctx.saved_tensors
        _, to_values, to_weight, to_bias = ctx.needs_input_grad
        dtype = converted.dtype
        if torch.is_grad_enabled():  # for a second derivative the weight itself is on the graph
            converted = weight.to(dtype)
        return (
            None,
            product(gradient, converted) if to_values else None,
            product(gradient.transpose(1, 2), values.to(dtype)) if to_weight else None,
            gradient.sum(1) if to_bias else None,
        )
