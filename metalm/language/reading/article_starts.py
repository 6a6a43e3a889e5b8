"""Has an article just begun? A small network that looks at the last few tokens of a stream.

    z_t = v tanh(A [e(u_{t-7}) ... e(u_t)] + c) + b

u are tokens and e vectors of the network's own. It is trained on the training articles laid end to
end, to tell the places where an article's third token has come, by logistic regression over all
places. It knows what a beginning looks like, not what a text is about: in WikiText it finds titles.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from metalm.language.text.articles import ArticleSet

WINDOW = 8
"""Tokens that it looks at."""

# How many of them are the new article's. Three and two are as good; eight are not, since the end of
# the last article tells too (56, 56 and 3 of 59 places in the validation text of WikiText-2).
_NEW = 3

# Rare words in titles are learned by heart where vectors begin large or decay little or nothing:
# then 9 of the 59 places are found.
_SIZE, _HIDDEN, _SPREAD, _SHUT = 8, 16, 0.02, -6.0
_STEPS, _BATCH, _RATE, _DECAY = 800, 8192, 0.01, 0.1


class ArticleStarts(nn.Module):
    """z of every token of a stream; above 0 the third token of an article has come.

    Args:
        vocabulary_size: number of tokens.
    """

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(vocabulary_size, _SIZE)
        self.hidden = nn.Linear(WINDOW * _SIZE, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, 1)
        nn.init.normal_(self.vectors.weight, std=_SPREAD)
        nn.init.constant_(self.out.bias, _SHUT)

    def forward(self, windows: Tensor) -> Tensor:
        """Z of windows of tokens.

        Args:
            windows: int64 [..., WINDOW], the oldest token first.
        """
        vectors: Tensor = self.vectors(windows).flatten(-2)
        scores: Tensor = self.out(torch.tanh(self.hidden(vectors)))
        return scores.squeeze(-1)


def windows_of(tokens: Tensor) -> Tensor:
    """All windows of a stream, [time - WINDOW + 1, ..., WINDOW] of int64 [time, ...]."""
    return tokens.unfold(0, WINDOW, 1)


def train_article_starts(articles: ArticleSet, vocabulary_size: int, seed: int) -> ArticleStarts:
    """Trained on a set of articles, laid end to end in one shuffled order; takes seconds.

    Every step sees all beginnings and as many other places as fit; these weigh what they stand
    for, so that z is the logarithm of the odds in the text.

    Raises:
        ValueError: no article of three tokens that follows five others.
    """
    refuse_no_starts(articles, seed)
    texts = [articles.tokens(number) for number in _order(articles, seed)]
    lengths = np.array([len(text) for text in texts])
    places = (np.cumsum(lengths) - lengths + _NEW - WINDOW)[lengths >= _NEW]
    places = torch.from_numpy(places[places >= 0])
    windows = windows_of(torch.from_numpy(np.concatenate(texts).astype(np.int64)))
    other = torch.ones(len(windows), dtype=torch.bool)
    other[places] = False
    return _fit(windows[places], windows[other], vocabulary_size, seed)


def refuse_no_starts(articles: ArticleSet, seed: int) -> None:
    """Checks that there is something to train on.

    Raises:
        ValueError: no article of three tokens follows five others.
    """
    before = 0
    for number in _order(articles, seed):
        length = len(articles.tokens(number))
        if length >= _NEW and before + _NEW >= WINDOW:
            return
        before += length
    raise ValueError(
        f"nothing shows where articles begin; expected one of at least {_NEW} tokens after "
        f"{WINDOW - _NEW} others, found {len(articles)} articles; give more text, or add "
        "--tuning.no-flush"
    )


def _order(articles: ArticleSet, seed: int) -> list[int]:
    """In which the articles are laid end to end."""
    order: list[int] = np.random.default_rng(seed).permutation(len(articles)).tolist()
    return order


def _fit(starts: Tensor, others: Tensor, vocabulary_size: int, seed: int) -> ArticleStarts:
    """From windows at beginnings, and at all other places."""
    share = len(others) / (len(starts) + len(others))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ArticleStarts(vocabulary_size)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            drawn = torch.randint(len(others), (min(_BATCH, len(others)),))
            missed = nn.functional.softplus(-network(starts)).mean()
            feigned = nn.functional.softplus(network(others[drawn])).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.lerp(missed, feigned, share).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)
