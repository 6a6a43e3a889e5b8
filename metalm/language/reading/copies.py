"""The losses of a method from the readings of its fast copies, with or without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from metalm.language.reading.cache import mixed_nats
from metalm.language.reading.mixing import Floats, mixture
from metalm.language.reading.mixture_network import (
    MixtureNetwork,
    fit_mixture_network,
    learned_mixture_nats,
    mixture_features,
)
from metalm.language.reading.reader import Readings


class Predictors(NamedTuple):
    """What is mixed for one text: fast copies, and perhaps the last one's cache."""

    log_probabilities: Floats
    """Of the token that came, by each predictor, [predictors, tokens]; nan: nothing to say."""
    prior: list[float]
    """Weights at the first token."""


def nats_of_copies(
    copies: Sequence[Readings],
    theta: int | None = None,
    share: float = 0.0,
    network: MixtureNetwork | None = None,
) -> list[Floats]:
    """Minus log probability of every token of each text.

    One copy is mixed with its cache by the fixed share (Grave, Joulin, Usunier 2017, equation 3).
    Several copies begin with equal weights, beside a cache that begins with its share, and are
    mixed as `mixing.py` has it, or `mixture_network.py`; with a network so are one copy and its
    cache. The cache is that of the last copy.

    Args:
        copies: readings of the same texts.
        theta: place of the cache's theta among those that were read with; None for no cache.
        share: lambda.
        network: adjusts the weights of the mixture; None leaves them.

    Returns:
        For each text, [tokens].
    """
    texts = range(len(copies[0].nats))
    if len(copies) == 1 and network is None:
        return [_alone(copies[0], text, theta, share) for text in texts]
    found = []
    for text in texts:
        said, prior = predictors_of(copies, text, theta, share)
        mixed = mixture(said, prior)
        if network is None:
            found.append(mixed.nats)
            continue
        features = mixture_features(copies, text, theta)
        found.append(learned_mixture_nats(network, features, mixed.logits, said))
    return found


def network_of_copies(
    copies: Sequence[Readings], theta: int | None, share: float, seed: int = 0
) -> MixtureNetwork:
    """The network that mixes these readings best (see `fit_mixture_network`)."""
    texts = range(len(copies[0].nats))
    said = [predictors_of(copies, text, theta, share) for text in texts]
    return fit_mixture_network(
        [mixture_features(copies, text, theta) for text in texts],
        [mixture(of_text.log_probabilities, of_text.prior).logits for of_text in said],
        [of_text.log_probabilities for of_text in said],
        seed=seed,
    )


def predictors_of(
    copies: Sequence[Readings], text: int, theta: int | None, share: float
) -> Predictors:
    """What several copies say of a text, and the cache if there is one with a share."""
    said = [-readings.nats[text] for readings in copies]
    prior = [(1 - share) / len(copies)] * len(copies)
    if theta is not None and share > 0.0:
        said.append(copies[-1].cache[text][theta])
        prior.append(share)
    return Predictors(np.stack(said), prior)


def _alone(readings: Readings, text: int, theta: int | None, share: float) -> Floats:
    nats = readings.nats[text]
    if theta is None:
        return nats
    cache = torch.from_numpy(readings.cache[text][theta])
    mixed: Floats = mixed_nats(torch.from_numpy(nats), cache, share).numpy()
    return mixed
