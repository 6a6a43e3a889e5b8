"""The text on which settings are chosen: the beginnings of some validation articles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metalm.adapt.token_losses import check_surprise
from metalm.language.reading.article_starts import WINDOW
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.methods import ALL_BUT_RECURRENT
from metalm.language.text.articles import ArticleSet
from metalm.training.checked_settings import refuse_below, refuse_empty, refuse_outside

Mode = str
"""Reading mode: "reset" at each article, or "carry" on across articles."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The text and the grids of the search."""

    articles: int = 8
    """Validation articles, spread evenly over the split."""
    tokens: int = 2000
    """Tokens read of each, from its start."""
    carry_tokens: int = 0
    """Tokens read of each in the carry-on mode, where rows cannot share the work; 0: as many."""
    adapt: tuple[str, ...] = ALL_BUT_RECURRENT
    """Patterns of the parameters that dynamic evaluation adapts."""
    segments: tuple[int, ...] = (20, 10, 5)
    """Segment lengths tried for dynamic evaluation. The first is searched over all settings, and at
    the others the rate alone, from there, before last walks go over all settings at the best."""
    rule_segments: tuple[int, ...] = (20, 10)
    """The same for the learned rules (they are trained at one of them)."""
    halvings: int = 1
    """How often the steps of the search are halved."""
    thetas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.66, 1.0)
    """Flatnesses of the cache."""
    shares: tuple[float, ...] = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.28)
    """Shares lambda of the cache."""
    window: int = 3785
    """Window of the cache (as AWD-LSTM on WikiText-2)."""
    rows: int = 8
    """Articles read at once in the reset mode."""
    surprise: float = 0.0
    """Power of a token's loss with which rivals and metalm walk once more; 0: they do not."""
    flush: bool = False
    """Whether, in the carry-on mode, metalm and the best rival are also tried with fast weights
    that go back to W_0 where the text shows that an article begins (`reading/flushing.py`)."""
    spreads: tuple[float, ...] = ()
    """Two fast copies are tried with the best rate times and over each of these numbers."""

    learned_cache: bool = False
    """Whether rivals and metalm come also with a cache whose lambda depends on the context: a
    network that is trained on this text says it for each token (`reading/mixture_network.py`)."""

    def __post_init__(self) -> None:
        """Checks the text and the grids."""
        refuse_empty(self, "tuning", "adapt", "segments", "rule_segments", "thetas", "shares")
        refuse_below(self, "tuning", "articles", "tokens", "segments", "rule_segments")
        refuse_below(self, "tuning", "window", "rows", "spreads")
        refuse_below(self, "tuning", "carry_tokens", "halvings", least=0)
        refuse_outside(self, "tuning", "shares")
        for theta in self.thetas:
            CacheConfig(theta=theta, window=self.window)
        check_surprise(self.surprise)


@dataclass(frozen=True, kw_only=True)
class TuningText:
    """The token arrays that are read, and how many words they stand for."""

    texts: Sequence[NDArray[np.int32]]
    """One per article (reset), or one in all (carry)."""
    num_words: int
    """Words and ends of line in the texts."""


def tuning_articles(articles: ArticleSet, config: TuningConfig) -> list[int]:
    """Places of the validation articles that are read, spread evenly over the split."""
    count = min(config.articles, len(articles))
    chosen: list[int] = np.linspace(0, len(articles) - 1, count).round().astype(int).tolist()
    return sorted(set(chosen))


def tuning_text(articles: ArticleSet, config: TuningConfig, mode: Mode) -> TuningText:
    """The first tokens of some validation articles; laid end to end when the mode is `carry`.

    There an article that is cut keeps its last tokens, so that what stands before a title is what
    stands there in the whole text: that shows where an article begins
    (`reading/article_starts.py`).
    """
    carries = mode == "carry"
    tokens = (config.carry_tokens or config.tokens) if carries else config.tokens
    texts, words = [], 0
    for index in tuning_articles(articles, config):
        article = articles[index]
        kept = _kept(len(article.tokens), tokens, WINDOW if carries else 0)
        texts.append(article.tokens[kept])
        words += len(np.unique(article.words[kept]))
    return TuningText(texts=[np.concatenate(texts)] if carries else texts, num_words=words)


def _kept(length: int, tokens: int, last: int) -> NDArray[np.int64]:
    """Places of so many tokens: the first ones, and as many of the last, if there is room."""
    last = last if 2 * last <= tokens < length else 0
    first = min(tokens, length) - last
    return np.concatenate((np.arange(first), np.arange(length - last, length)))
