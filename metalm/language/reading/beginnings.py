"""The beginnings of articles, and of text of any length: their tokens, words and nats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from metalm.language.network.model import LanguageModel
from metalm.language.reading.reader import Reader
from metalm.language.text.articles import Article

Losses = Sequence[NDArray[np.float64]]
"""Of every text, the nats of each of its tokens, [tokens]."""

Texts = Sequence[NDArray[np.int32]]
"""Token ids of every text."""


def beginnings(articles: Sequence[Article], tokens: int) -> list[NDArray[np.int32]]:
    """The first so many tokens of each, or all where there are fewer."""
    return [article.tokens[:tokens] for article in articles]


def num_words(articles: Sequence[Article], tokens: int) -> NDArray[np.float64]:
    """Words in the first so many tokens of each, [articles]; a word that is cut counts."""
    return np.array([a.words[:tokens][-1] + 1 for a in articles], np.float64)


def num_nats(losses: Losses, tokens: int) -> NDArray[np.float64]:
    """Summed losses of the first so many tokens of each, [texts]."""
    return np.array([of_text[:tokens].sum() for of_text in losses])


def static_nats(model: LanguageModel, texts: Texts, rows: int = 12) -> NDArray[np.float64]:
    """Nats of each text, read without learning, [texts].

    Args:
        model: not changed.
        texts: what is read, each from a fresh hidden state.
        rows: texts read at once.
    """
    losses = Reader(model, segment=64).read(texts, rows).nats
    return np.array([of_text.sum() for of_text in losses])
