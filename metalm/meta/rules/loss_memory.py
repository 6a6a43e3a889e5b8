"""What a row remembers of its losses, and what they say of the step at hand.

After l_0 .. l_n, let a_k be the average of the losses before l_n, with weights that fall by
e^(-1/k) a step, and a'_k the same with l_n. sigma^2 is such an average (k = 20) of all u^2 so far,
u being l - a_20, and (a_20 / 1000)^2, so that rounding is no surprise.

    loss     sign(l) log(1 + |l|)
    surprise u / (|u| + sigma)              of this step; 0 at first, when nothing was expected
    drift    v / (|v| + sigma), v = a'_3 - a_20: the same of the last few steps
    position log(1 + n) / log(513), 1 from step 512 on
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = ("loss", "surprise", "drift", "position")

LossMemory = dict[str, Tensor]
"""``loss`` of the step at hand, ``steps`` before it, and sums over these: each ``[rows]`` or []."""

# Steps after which an average has forgotten all but 1/e: guesses, so that surprise is against some
# hundred tokens and drift spans a few segments.
_HORIZONS = {"short": 3.0, "long": 20.0, "spread": 20.0}
# Steps after which "position" no longer tells. Most articles end before.
_FAR = 512
# Part of the average loss that is taken for noise at least: a guess, far below that of a segment.
_LEAST = 1e-3


def fresh(shape: Sequence[int], like: Tensor) -> LossMemory:
    """The memory before the first loss."""
    return {name: like.new_zeros(shape) for name in ("loss", "steps", *_HORIZONS)}


def features(memory: LossMemory, names: Sequence[str]) -> Tensor:
    """Some of `FEATURES` of the step at hand, ``[rows, features]`` or ``[features]``."""
    loss, steps = memory["loss"], memory["steps"]
    later = _with_this_step(memory)
    earlier = memory["long"] / _weights("long", steps).where(steps > 0, 1.0)
    spread = later["spread"] / _weights("spread", steps).where(steps > 0, 1.0)
    floor = (_LEAST * earlier).square() + torch.finfo(loss.dtype).eps ** 2  # 0 has no root's slope
    spread = (spread + floor).sqrt()
    drift = later["short"] / _weights("short", steps + 1) - earlier
    found = {
        "loss": loss.sign() * loss.abs().log1p(),
        "surprise": _in_units(_surprise(memory), spread),
        "drift": _in_units(drift.where(steps > 0, 0.0), spread),
        "position": steps.clamp(max=_FAR).log1p() / math.log1p(_FAR),
    }
    return torch.stack([found[name] for name in names], -1) if names else loss[..., None][..., :0]


def after_the_step(memory: LossMemory) -> LossMemory:
    """The memory to which the loss at hand is one of the earlier ones."""
    return {**memory, **_with_this_step(memory), "steps": memory["steps"] + 1}


def _surprise(memory: LossMemory) -> Tensor:
    """The loss at hand less the average of earlier ones; 0 at first."""
    loss, steps = memory["loss"], memory["steps"]
    average = memory["long"] / _weights("long", steps).where(steps > 0, 1.0)
    return (loss - average).where(steps > 0, 0.0)


def _with_this_step(memory: LossMemory) -> LossMemory:
    """The weighted sums, those of this step included with weight 1."""
    new = {
        "short": memory["loss"],
        "long": memory["loss"],
        "spread": _surprise(memory).square(),
    }
    return {
        kind: number + math.exp(-1 / _HORIZONS[kind]) * memory[kind] for kind, number in new.items()
    }


def _weights(kind: str, count: Tensor) -> Tensor:
    """The sum of the weights of so many steps."""
    fade = 1 / _HORIZONS[kind]
    return torch.expm1(-fade * count) / math.expm1(-fade)


def _in_units(number: Tensor, unit: Tensor) -> Tensor:
    return number / (number.abs() + unit)
