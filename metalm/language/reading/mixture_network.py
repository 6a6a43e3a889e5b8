"""A small network that says how much each predictor of a token deserves, from how sure they are.

The weights of `mixing.py` learn slowly, from what came. A cache that has just found the same words
again, or a fast copy that is far more certain than the slow one, is known before the token comes.
With z the logits that `mixing.py` has at a token and c what the readings say of their confidence,

    log w = log_softmax(z + f(c)),    p(x_t) = sum over k of w_k p_k(x_t)

f is a network of one hidden layer, zero before it is trained: then the mixture is that of
`mixing.py`. It is trained by gradient descent on -log p(x_t), on text that chooses settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metalm.language.reading.reader import Readings

Floats = NDArray[np.float64]

_MOST = 5.0  # standard deviations that a feature may be away from its mean
# Of its training (AdamW). Tried on twelve validation articles, not searched (EXPERIMENTS.md).
_STEPS, _BATCH, _RATE, _DECAY = 300, 4096, 0.01, 0.05


class MixtureNetwork(nn.Module):
    """The function f: features of a token to what is added to each predictor's logit.

    Args:
        num_features: of `mixture_features`.
        num_predictors: copies, and the cache if there is one.
        hidden: units of the hidden layer (tanh).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int, num_predictors: int, hidden: int = 24) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.inner = nn.Linear(num_features, hidden)
        self.outer = nn.Linear(hidden, num_predictors)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[tokens, features] to [tokens, predictors]; nan stands for what cannot be known yet."""
        standard = ((features - self.mean) / self.scale).clamp(-_MOST, _MOST).nan_to_num(0.0)
        said: Tensor = self.outer(self.inner(standard).tanh())
        return said

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Takes mean and standard deviation from these features [tokens, features]."""
        known = features.isfinite()
        clean = features.where(known, 0.0)
        count = known.sum(0).clamp(min=1)
        mean = clean.sum(0) / count
        spread = ((clean - mean).square().where(known, 0.0).sum(0) / count).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(spread.clamp(min=1e-3))


def mixture_features(copies: Sequence[Readings], text: int, theta: int | None) -> Tensor:
    """What is known before each token of a text, float32 [tokens, features].

    Of each copy the highest log probability and the entropy; with a cache, of the last copy's the
    same, the highest inner product and the length of h_t.

    Args:
        copies: readings that kept their confidence.
        text: number of the text.
        theta: place of the cache's theta among those that were read with; None for no cache.

    Raises:
        ValueError: a reading did not keep its confidence.
    """
    if any(not readings.confidence for readings in copies):
        raise ValueError(
            "a reading has not kept how sure it was; expected confidence of every copy, found "
            "none; read again with confidence=True"
        )
    found = [readings.confidence[text][:2] for readings in copies]
    if theta is not None:
        cache = copies[-1].confidence[text][2:]
        flatnesses = (len(cache) - 2) // 2
        found.append(cache[[theta, flatnesses + theta, 2 * flatnesses, 2 * flatnesses + 1]])
    return torch.from_numpy(np.concatenate(found)).t().clamp(min=-1e3)


def learned_mixture_nats(
    network: MixtureNetwork, features: Tensor, logits: Floats, log_probabilities: Floats
) -> Floats:
    """Minus log probability of every token under the mixture that the network adjusts, [tokens].

    Args:
        network: f.
        features: [tokens, features].
        logits: z before each token, [predictors, tokens], nan where a predictor has nothing to say.
        log_probabilities: of the token that came, [predictors, tokens].
    """
    with torch.no_grad():
        said = _nats(
            network, features, torch.from_numpy(logits), torch.from_numpy(log_probabilities)
        )
    return said.numpy()


def fit_mixture_network(
    features: Sequence[Tensor],
    logits: Sequence[Floats],
    log_probabilities: Sequence[Floats],
    *,
    hidden: int = 24,
    seed: int = 0,
) -> MixtureNetwork:
    """A network trained on texts, all their tokens alike (AdamW, 300 steps of 4,096 tokens).

    Args:
        features: of each text, as for `learned_mixture_nats`.
        logits: likewise.
        log_probabilities: likewise.
        hidden: units of the hidden layer.
        seed: of its first numbers, and of which tokens a step takes.
    """
    inputs = torch.cat(list(features))
    before, said = (
        torch.from_numpy(np.concatenate(part, axis=1)).float()
        for part in (logits, log_probabilities)
    )
    generator = torch.Generator().manual_seed(seed)
    network = MixtureNetwork(inputs.shape[1], len(said), hidden)
    with torch.no_grad():
        weight = torch.randn(network.inner.weight.shape, generator=generator)
        network.inner.weight.copy_(weight / inputs.shape[1] ** 0.5)
        network.inner.bias.zero_()
    network.standardise(inputs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    for _ in range(_STEPS):
        taken = torch.randint(len(inputs), (_BATCH,), generator=generator)
        loss = _nats(network, inputs[taken], before[:, taken], said[:, taken]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)


def _nats(network: MixtureNetwork, features: Tensor, logits: Tensor, said: Tensor) -> Tensor:
    adjusted = logits + network(features).t()
    silent = said.isnan()
    weights = adjusted.masked_fill(silent, -torch.inf).log_softmax(0)
    return -torch.logsumexp(weights + said.masked_fill(silent, 0.0), 0)
