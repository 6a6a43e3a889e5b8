"""Matrix products with weights per row, in bfloat16 where autocast asks for it.

Autocast reaches the operations of a model, not the inside of an autograd function with a backward
of its own. Such a function asks here for the type of its large products, converts each weight
once, and keeps everything else in its own type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


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
    return (left.to(right.dtype) @ right).to(left.dtype)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off inside a function, whose types are its own business."""

    @wraps(function)
    def inside(ctx: Any, *arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(ctx, *arguments)

    return inside
