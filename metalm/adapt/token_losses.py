"""The losses of tokens: what counts, and what a surprising token makes of it for learning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Nats of a token that weighs 1: about the mean of a small model on an article. Another number would
# be another rate.
TYPICAL_NATS = 3.0


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus log probability of each target, in nats, at least in float32.

    Where the logits are not finite the model has said nothing, and the uniform distribution speaks
    for it: the choice does not look at the target.

    Args:
        logits: [..., vocabulary].
        targets: int64 [...].
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    flat = logits.flatten(0, -2)
    nats = nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    said = logits.detach().sum(-1).isfinite()
    return torch.where(said, nats, math.log(logits.shape[-1]))


def by_surprise(nats: Tensor, power: float) -> Tensor:
    """Weigh each token: nats (nats / 3)^power, where the second factor is held constant.

    Args:
        nats: minus log probability of each token, of any shape.
        power: 0 leaves them as they are; above 0, what is hardly a surprise is hardly learnt from.
    """
    return nats * (nats.detach() / TYPICAL_NATS) ** power if power else nats


def check_surprise(power: float) -> None:
    """Refuses a power that cannot be.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0.0 <= power < math.inf:
        raise ValueError(
            "surprise is the power by which a token's loss weighs it; expected a finite number "
            f"from 0, found {power}; do change it"
        )
