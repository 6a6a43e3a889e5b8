"""How far apart two stacks of maps are, if every place may look for its like nearby.

The distance of the image distortion model (Keysers, Deselaers, Gollan, Ney 2007, "Deformation
models for image recognition", zero-order), on maps of a network instead of grey values and made
symmetric: a stroke that ends a little further to the left costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def elastic_distance(left: Tensor, right: Tensor, reach: int) -> Tensor:
    """Sum over the places of each of the squared distance to the nearest like place of the other.

        d(a, b) = sum over p of min over |r| <= reach of |a_p - b_{p+r}|^2
                + sum over p of min over |r| <= reach of |b_p - a_{p+r}|^2

    where p + r stays on the maps, and |r| is the larger one of its two steps.

    Args:
        left: a, [tasks, left, maps, height, width].
        right: b, [tasks, right, maps, height, width].
        reach: in places; with 0 it is twice the squared Euclidean distance.

    Returns:
        [tasks, left, right].

    Raises:
        ValueError: a negative reach.
    """
    if reach < 0:
        raise ValueError(f"impossible reach; expected at least 0 places, found {reach}; change it")
    return _one_way(left, right, reach) + _one_way(right, left, reach).mT


def _one_way(left: Tensor, right: Tensor, reach: int) -> Tensor:
    """The first of the two sums, [tasks, left, right]."""
    tasks, count, _, height, width = right.shape
    side = 2 * reach + 1
    near = _neighbours(right.flatten(0, 1), reach)  # [tasks count, maps, side^2, places]
    near = near.unflatten(0, (tasks, count)).permute(0, 4, 2, 1, 3)  # [., places, maps, count, .]
    near = near.flatten(3)  # [tasks, places, maps, count side^2]
    own = left.flatten(3).permute(0, 3, 1, 2)  # [tasks, places, left, maps]
    lengths = own.square().sum(3, keepdim=True) + near.square().sum(2, keepdim=True)
    apart = (lengths - 2 * own @ near).unflatten(3, (count, side * side))
    outside = _neighbours(right.new_ones(1, 1, height, width), reach)[0, 0] == 0
    return apart.masked_fill(outside.t()[:, None, None], torch.inf).amin(4).sum(1)


def _neighbours(maps: Tensor, reach: int) -> Tensor:
    """What is around every place, zeros outside.

    Args:
        maps: [items, maps, height, width].
        reach: in places.

    Returns:
        [items, maps, (2 reach + 1)^2, height width].
    """
    found = functional.unfold(maps, 2 * reach + 1, padding=reach)
    return found.unflatten(1, (maps.shape[1], -1))
