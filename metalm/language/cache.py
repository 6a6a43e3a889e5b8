"""The neural cache: what followed a similar hidden state earlier in the text is likely again.

    p(w) = (1 - lambda) p_model(w) + lambda p_cache(w)
    p_cache(w) = sum over past i of softmax_i(theta h_t . h_i) [x_{i+1} = w]

over the last `window` pairs (h_i, x_{i+1}) whose token has been read (Grave, Joulin, Usunier 2017,
equations 3 and 4). It needs no training and adds to any model, adapting or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """One setting of the cache."""

    theta: float = 0.66
    """Flatness: the scale of the inner products (0.66 is what AWD-LSTM uses on WikiText-2)."""
    share: float = 0.13
    """lambda, the cache's share of the mixture."""
    window: int = 3785
    """How many past tokens are kept."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not self.theta > 0.0:
            raise ValueError(
                f"the cache's theta is a scale; expected a number above 0, found {self.theta}."
            )
        if not 0.0 <= self.share < 1.0:
            raise ValueError(
                f"the cache's share is a probability; expected 0 <= share < 1, found {self.share}."
            )
        if self.window < 1:
            raise ValueError(f"the cache needs a window; expected at least 1, found {self.window}.")


class CacheMemory:
    """The past of one row: features and the tokens that followed them.

    Args:
        window: how many pairs are kept.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.tokens: Tensor | None = None

    def score(self, features: Tensor, targets: Tensor, thetas: Tensor) -> Tensor:
        """Scores a segment, each token from the pairs before it, then keeps the segment's pairs.

        Args:
            features: [time, size], h_t.
            targets: int64 [time], x_{t+1}.
            thetas: [flatnesses].

        Returns:
            log p_cache of each target, [flatnesses, time]: -inf where the token is not in the
            cache, nan where the cache is still empty.
        """
        time = len(targets)
        keys = features if self.keys is None else torch.cat((self.keys, features))
        tokens = targets if self.tokens is None else torch.cat((self.tokens, targets))
        past = len(tokens) - time
        distance = torch.arange(past, past + time, device=tokens.device).unsqueeze(
            1
        ) - torch.arange(len(tokens), device=tokens.device)
        seen = (distance > 0) & (distance <= self.window)  # [time, past + time]
        products = features @ keys.t()
        scaled = thetas.view(-1, 1, 1) * products.masked_fill(~seen, -torch.inf)
        matches = seen & (tokens == targets.unsqueeze(1))
        log_probabilities = torch.logsumexp(scaled.masked_fill(~matches, -torch.inf), -1)
        log_probabilities -= torch.logsumexp(scaled, -1)
        self.keys, self.tokens = keys[-self.window :], tokens[-self.window :]
        return log_probabilities.masked_fill(~seen.any(-1), torch.nan)


def mixed_nats(nats: Tensor, cache_log_probabilities: Tensor, share: float) -> Tensor:
    """Minus log of the mixture, for tokens of which the model said `nats`.

    Where the cache is empty (nan) the model speaks alone.
    """
    if share == 0.0:
        return nats
    mixed = torch.logaddexp(
        -nats + torch.log1p(torch.tensor(-share, dtype=nats.dtype)),
        cache_log_probabilities + torch.log(torch.tensor(share, dtype=nats.dtype)),
    )
    return torch.where(cache_log_probabilities.isnan(), nats, -mixed)
