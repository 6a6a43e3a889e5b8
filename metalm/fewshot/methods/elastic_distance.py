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
    tasks, count, maps, height, width = right.shape
    reach = min(reach, max(height, width) - 1)
    near = _neighbours(right.flatten(0, 1), reach).unflatten(0, (tasks, count))
    near = near.permute(0, 4, 2, 3, 1).reshape(tasks * height * width, maps, -1)
    own = left.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)  # [tasks places, left, maps]
    inside = _neighbours(right.new_ones(1, 1, height, width), reach)[0, 0].t()
    beyond = torch.zeros_like(inside).masked_fill(inside == 0, torch.inf)  # [places, side^2]
    lengths = near.square().sum(1, keepdim=True)
    lengths = lengths + beyond.repeat_interleave(count, 1).repeat(tasks, 1).unsqueeze(1)
    apart = torch.baddbmm(lengths, own, near, alpha=-2) + own.square().sum(2, keepdim=True)
    apart = apart.clamp_min(0)  # rounding
    # |a_p - b_{p+r}|^2, [tasks, height, width, left, side^2, right]
    apart = apart.unflatten(2, (-1, count)).unflatten(0, (tasks, height, width))
    forth = apart.amin(4)
    back = torch.stack(_by_place_of_right(apart, reach)).amin(0)
    return (forth + back).sum((1, 2))


def _by_place_of_right(apart: Tensor, reach: int) -> list[Tensor]:
    """For each r, |a_{p-r} - b_p|^2 at p, [tasks, height, width, left, right]."""
    height, width = apart.shape[1:3]
    steps = range(-reach, reach + 1)
    shifts = [(down, across) for down in steps for across in steps]
    return [
        functional.pad(each, (0, 0, 0, 0, across, -across, down, -down), value=torch.inf)
        for (down, across), each in zip(shifts, apart.unbind(4), strict=True)
        if abs(down) < height and abs(across) < width  # the others see nothing but the outside
    ]


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
