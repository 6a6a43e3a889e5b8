"""Two views of the fast weights that share storage: the forward copy and the backward copy.

The *backward copy* lies on the differentiable path from W_0 and the rule's parameters. The *forward
copy* holds the same numbers in the same memory as leaves; the inner loss is taken on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.parameters import Parameters


def stack_rows(slow: Parameters, rows: int) -> Parameters:
    """W_0 as the first fast weights of several rows (articles, tasks): a view, nothing is copied.

    Args:
        slow: W_0, each tensor ``[*shape]``.
        rows: Number of rows, at least 1.

    Returns:
        Tensors ``[rows, *shape]``, differentiable to W_0 (the gradient is summed over rows).

    Raises:
        ValueError: Fewer than one row.
    """
    if rows < 1:
        raise ValueError(
            f"cannot stack {rows} rows; expected at least 1, found {rows}; do skip empty batches"
        )
    return {name: tensor.expand(rows, *tensor.shape) for name, tensor in slow.items()}


def forward_copy(parameters: Parameters) -> Parameters:
    """Leaves that require a gradient and share storage with the given (backward) copies."""
    return {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}


def forgotten(parameters: Parameters) -> Parameters:
    """The same numbers in the same memory, without their history."""
    return {name: tensor.detach() for name, tensor in parameters.items()}


def rebase(fast: Parameters, slow: Parameters) -> Parameters:
    """Truncate: keep the numbers, forget the history, and hold W - W_0 constant from here on.

    The result depends on W_0 with the identity as its derivative, so that a gradient that reaches
    the truncation goes on to W_0 (summed over rows) and to nothing else.

    Args:
        fast: Fast weights, each ``[*shape]`` or ``[rows, *shape]``.
        slow: W_0, each ``[*shape]``, same names.

    Returns:
        Tensors that share storage with ``fast``.
    """
    return {name: _Rebase.apply(tensor, slow[name]) for name, tensor in fast.items()}


class _Rebase(torch.autograd.Function):
    """fast -> fast, with d/d slow = identity in each row and d/d fast = 0."""

    @staticmethod
    def forward(ctx: Any, fast: Tensor, slow: Tensor) -> Tensor:
        ctx.stacked = fast.dim() > slow.dim()
        return fast.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.sum(0) if ctx.stacked else gradient
