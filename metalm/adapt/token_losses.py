"""The losses of tokens: what counts, and what a surprising token makes of it for learning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Nats of a token that weighs 1: about the mean of a small model on an article. Another number would
# be another rate.
TYPICAL_NATS = 3.0

# A segment that is worse than this many times the uniform guess has lost its way; of fewer tokens
# than these the mean says little (one rare word may cost as much).
_LOST = 2.0
_ENOUGH_TOKENS = 4


def token_nats(logits: Tensor, targets: Tensor, said: Tensor | None = None) -> Tensor:
    """Minus log probability of each target, in nats, at least in float32.

    Where the model has said nothing the uniform distribution speaks for it; the choice does not
    look at the target.

    Args:
        logits: [..., vocabulary].
        targets: int64 [...].
        said: where the model has said something, bool [...]; where it `says_something` by default.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    flat = logits.flatten(0, -2)
    nats = nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    said = says_something(logits) if said is None else said
    return torch.where(said, nats, math.log(logits.shape[-1]))


def says_something(logits: Tensor) -> Tensor:
    """Where logits give a distribution: no nan, no infinity, and not all of them minus infinity.

    Some of minus infinity are tokens that cannot come.

    Args:
        logits: [..., vocabulary].

    Returns:
        bool [...].
    """
    return logits.detach().amax(-1).isfinite()


def far_from_sense(nats: Tensor, tokens: Tensor | int, vocabulary_size: int) -> Tensor:
    """Where a segment is so far worse than a uniform guess that the fast weights have misled.

    Args:
        nats: summed losses of segments, of any shape.
        tokens: how many they are of, likewise.
        vocabulary_size: of the guess.

    Returns:
        bool, likewise.
    """
    means = nats / torch.as_tensor(tokens, device=nats.device).clamp(min=_ENOUGH_TOKENS)
    return means > _LOST * math.log(max(2, vocabulary_size))


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
