"""The losses of a method from the readings of its fast copies, with or without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metalm.language.cache import mixed_nats
from metalm.language.mixing import mixture_nats
from metalm.language.reading import Readings


def nats_of_copies(
    copies: Sequence[Readings], theta: int | None = None, share: float = 0.0
) -> list[NDArray[np.float64]]:
    """Minus log probability of every token of each text.

    One copy is mixed with its cache by the fixed share (Grave, Joulin, Usunier 2017, equation 3).
    Several copies begin with equal weights, beside a cache that begins with its share, and are
    mixed as `mixing.py` has it. The cache is that of the last copy.

    Args:
        copies: readings of the same texts.
        theta: place of the cache's theta among those that were read with; None for no cache.
        share: lambda.

    Returns:
        For each text, [tokens].
    """
    caches = [None] * len(copies[0].nats) if theta is None else copies[-1].cache
    return [
        _of_text([readings.nats[text] for readings in copies], cache, theta, share)
        for text, cache in enumerate(caches)
    ]


def _of_text(
    nats: Sequence[NDArray[np.float64]],
    cache: NDArray[np.float64] | None,
    theta: int | None,
    share: float,
) -> NDArray[np.float64]:
    if len(nats) == 1:
        (alone,) = nats
        if cache is None:
            return alone
        return mixed_nats(torch.from_numpy(alone), torch.from_numpy(cache[theta]), share).numpy()
    said = [-of_copy for of_copy in nats]
    prior = [(1 - share) / len(nats)] * len(nats)
    if cache is None or share == 0.0:
        return mixture_nats(said, prior)
    return mixture_nats([*said, cache[theta]], [*prior, share])
