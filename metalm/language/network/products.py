"""Matrix products with weights per row, in bfloat16 where autocast asks for it.

Autocast reaches the operations of a model, not the inside of an autograd function with a backward
of its own. Such a function asks here for the type of its large products, converts each weight
once, and keeps everything else in its own type. Products in float32 go through the library that
takes batches of few rows fastest, if it is as exact (`metalm/training/precision.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from metalm.training.precision import quickest_float32


def product_type(tensor: Tensor) -> torch.dtype:
    """The type in which large products should be taken: autocast's, or the tensor's own.

    As everywhere under autocast, float64 stays what it is.
    """
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right, taken in the type of the right and given in the type of the left.

    Args:
        left: [..., m, k].
        right: [..., k, n].
    """
    converted = left.to(right.dtype)
    with quickest_float32(converted):
        return (converted @ right).to(left.dtype)


def product_and_bias(left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    """`product`, and a bias for each column of each matrix of a batch.

    Args:
        left: [rows, m, k].
        right: [rows, k, n].
        bias: [rows, n], in the type of the left.
    """
    if right.dtype != left.dtype:
        return product(left, right).add_(bias.unsqueeze(1))
    with quickest_float32(left):
        return torch.baddbmm(bias.unsqueeze(1), left, right)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off inside a function, whose types are its own business."""

    @wraps(function)
    def inside(ctx: Any, *arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(ctx, *arguments)

    return inside
