"""The neural cache: what followed a similar hidden state earlier in the text is likely again.

    p(w) = (1 - lambda) p_model(w) + lambda p_cache(w)
    p_cache(w) = sum over past i of softmax_i(theta h_t . h_i) [x_{i+1} = w]

over the last `window` pairs (h_i, x_{i+1}) whose token has been read (Grave, Joulin, Usunier 2017,
equations 3 and 4). It needs no training and adds to any model, adapting or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
                f"the cache's theta is a scale; expected a number above 0, found {self.theta}; do "
                "choose one"
            )
        if not 0.0 <= self.share < 1.0:
            raise ValueError(
                f"the cache's share is a probability; expected 0 <= share < 1, found {self.share}; "
                "do change it"
            )
        if self.window < 1:
            raise ValueError(
                f"the cache needs a window; expected at least 1, found {self.window}; do raise it"
            )


class CacheScore(NamedTuple):
    """What a cache says of the tokens of a segment."""

    log_probabilities: Tensor
    """log p_cache of each target, [flatnesses, time]: -inf where the token is not in the cache, nan
    where the cache is still empty."""
    confidence: Tensor
    """How sure it is before the token comes, [2 flatnesses + 2, time]: for each flatness the
    highest log probability of a token, then for each the entropy in nats; the highest h_t . h_i,
    and the length of h_t. All but the last are nan where the cache is still empty."""


def asked_together(device: torch.device) -> int:
    """How many tokens of a row a cache is asked for at once: on a GPU each question takes long.

    What it says of a token does not depend on it.
    """
    return 512 if device.type == "cuda" else 1


class CacheMemory:
    """The past of one row: features and the tokens that followed them.

    Args:
        window: how many pairs are kept.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._keys = torch.empty(0, 0)
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._kept = range(0)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def waiting(self) -> int:
        """How many pairs wait to be scored."""
        return sum(len(targets) for _, targets in self._waiting)

    def wait(self, features: Tensor, targets: Tensor) -> None:
        """Keeps pairs as `score` takes them, to be scored together with those after them."""
        self._waiting.append((features, targets))

    def score_waiting(self, thetas: Tensor, *, confidence: bool = False) -> CacheScore:
        """Scores all pairs that wait, in their order; see `score`."""
        features, targets = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        return self.score(features, targets, thetas.to(features), confidence=confidence)

    @property
    def tokens(self) -> Tensor:
        """The tokens that are kept, at most `window`, oldest first."""
        return self._tokens[self._kept.start : self._kept.stop]

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The features and the tokens that are kept, [kept, size] and [kept], oldest first."""
        return self._keys[self._kept.start : self._kept.stop], self.tokens

    def restore(self, features: Tensor, tokens: Tensor) -> None:
        """Puts back what `pairs` gave."""
        self._keys, self._tokens, self._kept = features, tokens, range(len(tokens))

    def score(
        self, features: Tensor, targets: Tensor, thetas: Tensor, *, confidence: bool = False
    ) -> CacheScore:
        """Scores a segment, each token from the pairs before it, then keeps the segment's pairs.

        Args:
            features: [time, size], h_t.
            targets: int64 [time], x_{t+1}.
            thetas: [flatnesses].
            confidence: whether to say how sure the cache is; else that part is empty.
        """
        time, past = len(targets), len(self._kept)
        numbers = 2 * len(thetas) + 2 if confidence else 0
        if time == 0:
            return CacheScore(features.new_empty(len(thetas), 0), features.new_empty(numbers, 0))
        keys, tokens = self._append(features, targets)
        distance = torch.arange(past, past + time, device=tokens.device).unsqueeze(
            1
        ) - torch.arange(past + time, device=tokens.device)
        seen = (distance > 0) & (distance <= self.window)  # [time, past + time]
        products = (features @ keys.t()).masked_fill_(~seen, -torch.inf)
        highest = products.amax(-1, keepdim=True)
        products -= highest.masked_fill(highest == -torch.inf, 0.0)
        rows, columns = (seen & (tokens == targets.unsqueeze(1))).nonzero(as_tuple=True)
        matching = products[rows, columns]
        weights = torch.empty_like(products)
        first = _first_places(tokens) if confidence else None
        found, surest, entropies = [], [], []
        for theta in thetas.to(products):
            total = torch.mul(products, theta, out=weights).exp_().sum(-1)
            found.append(_sum_in_rows(theta * matching, rows, time) - total.log())
            if first is not None:
                by_token = _by_token(weights, first) / total.unsqueeze(-1)
                surest.append(by_token.amax(-1).log())
                entropies.append(torch.special.entr(by_token).sum(-1))
        empty = ~seen.any(-1)
        said = torch.stack(found).masked_fill(empty, torch.nan)
        if not confidence:
            return CacheScore(said, features.new_empty(0, time))
        sure = torch.stack([*surest, *entropies, highest.squeeze(-1)]).masked_fill(empty, torch.nan)
        return CacheScore(said, torch.cat([sure, features.norm(dim=-1).unsqueeze(0)]))

    def _append(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Puts pairs behind those that are kept; returns both together, oldest first."""
        time = len(targets)
        if self._kept.stop + time > len(self._tokens):
            self._make_room(features, time)
        kept = self._kept
        end = kept.stop + time
        self._keys[kept.stop : end] = features
        self._tokens[kept.stop : end] = targets
        self._kept = range(max(kept.start, end - self.window), end)
        return self._keys[kept.start : end], self._tokens[kept.start : end]

    def _make_room(self, like: Tensor, time: int) -> None:
        """Moves the pairs to the front, of a larger block if they would fill half of this one.

        A full block is used again: one that is given up for its like leaves a hole in memory.
        """
        kept = self._kept
        keys, tokens = self._keys, self._tokens
        if kept.start < len(kept) + time:
            room = 2 * (len(kept) + time)
            keys = like.new_empty(room, like.shape[1])
            tokens = torch.empty(room, dtype=torch.int64, device=like.device)
        if kept:
            keys[: len(kept)] = self._keys[kept.start : kept.stop]
            tokens[: len(kept)] = self._tokens[kept.start : kept.stop]
        self._keys, self._tokens, self._kept = keys, tokens, range(len(kept))


def _first_places(tokens: Tensor) -> Tensor:
    """Where the token of each place stands for the first time, [past]."""
    distinct, numbers = tokens.unique(return_inverse=True)
    places = torch.arange(len(tokens), device=tokens.device)
    first = places.new_full((len(distinct),), len(tokens))
    return first.scatter_reduce(0, numbers, places, "amin")[numbers]


def _by_token(weights: Tensor, first: Tensor) -> Tensor:
    """Weights [time, past] added up by the token of each; a token's sum is where it first stands.

    Zeros elsewhere: which numbers a row has, and in which order, does not depend on later tokens,
    not even in the last bit of their sum.
    """
    return torch.zeros_like(weights).scatter_add_(1, first.expand_as(weights), weights)


def _sum_in_rows(logarithms: Tensor, rows: Tensor, count: int) -> Tensor:
    """Log of the sum of exp of each row's numbers, [count]; -inf for a row without any."""
    highest = logarithms.new_full((count,), -torch.inf)
    highest = highest.scatter_reduce(0, rows, logarithms, "amax")
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    sums = torch.zeros_like(highest).index_add_(0, rows, (logarithms - shift[rows]).exp())
    return sums.log() + shift


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
