"""What consolidation does: better beginnings of later articles, and what is forgotten for them.

Articles are read in one succession, W_0 consolidated between them, against reading each for itself.
Half-way, between the articles that are read first and the others, texts are re-read static with
what W_0 has become, the others among them: none of them has been read by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metalm.analysis.statistics.bootstrap import Interval, ratio_intervals
from metalm.language.memory.consolidation import (
    ConsolidationConfig,
    LongTermMemory,
    read_in_succession,
)
from metalm.language.memory.related_articles import nearest_earlier, similarities
from metalm.language.reading.beginnings import beginnings, num_nats, num_words, static_nats
from metalm.language.reading.reader import Reader
from metalm.language.text.articles import Article

Found = dict[str, Any]
"""Figures by name, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class Succession:
    """What is read in which order, how much of it, and what is looked at."""

    first: Sequence[Article]
    """Read first."""
    then: Sequence[Article]
    """Read then; re-read static half-way, before."""
    old: Sequence[Article]
    """Of those that every training read; re-read static half-way and in the end."""
    tokens: int
    """Read of each."""
    static_tokens: int
    """Re-read of each of the second."""
    beginnings: tuple[int, ...]
    """Tokens of a beginning, of several lengths."""
    shown: int
    """Tokens of the beginnings whose gains are given article by article."""
    related: float
    """Cosine (`similarities`) from which on an article is related to an earlier one."""

    @property
    def articles(self) -> list[Article]:
        """All that is read in succession."""
        return [*self.first, *self.then]


class _Static(NamedTuple):
    """What re-reading costs with the weights as they were trained, and how many words it is."""

    texts: list[NDArray[np.int32]]
    nats: NDArray[np.float64]
    words: NDArray[np.float64]


class Effect:
    """Everything that is the same whatever the setting, and then each setting.

    Args:
        reader: the trained model and its rule; not changed.
        fisher: of the training set (`training_fisher`).
        succession: what is read.
    """

    def __init__(
        self, reader: Reader, fisher: Mapping[str, Tensor], succession: Succession
    ) -> None:
        self._reader, self._fisher, self._succession = reader, fisher, succession
        articles = succession.articles
        self._nearest, self._cosines = nearest_earlier(similarities([a.text for a in articles]))
        self._texts = beginnings(articles, succession.tokens)
        self._reset = reader.read(self._texts, 4).nats
        self._then = self._static(succession.then, succession.static_tokens)
        self._old = self._static(succession.old, succession.tokens)
        self._groups = _groups(
            len(succession.first), len(succession.then), self._cosines >= succession.related
        )

    def without(self) -> Found:
        """Which articles are related, how many are in each group, and what they cost by themselves.

        Perplexities are per word.
        """
        succession, articles = self._succession, self._succession.articles
        return {
            "articles": [
                {"title": a.title, "nearest": int(n), "cosine": float(c)}
                for a, n, c in zip(articles, self._nearest, self._cosines, strict=True)
            ],
            "static perplexity": {
                "valid": float(np.exp(self._then.nats.sum() / self._then.words.sum())),
                "old": float(np.exp(self._old.nats.sum() / self._old.words.sum())),
            },
            "groups": {name: int(of_group.sum()) for name, of_group in self._groups.items()},
            "beginnings without": {
                f"{name}, {tokens}": self._perplexity(of_group, tokens)
                for name, of_group in self._groups.items()
                for tokens in succession.beginnings
            },
        }

    def of(
        self, setting: ConsolidationConfig, half_way: Callable[[LongTermMemory, Found], None]
    ) -> Found:
        """Reads everything under one setting.

        Args:
            setting: how far W_0 moves.
            half_way: told the memory and what was found so far, before the second articles.

        Returns:
            "setting"; "moved" (`LongTermMemory.moved`, half-way); "static, ..." as perplexities
            over those without consolidation; "gain, GROUP, TOKENS" in nats per word over reading
            each article for itself; intervals are a bootstrap's over articles; and "gains", the
            nats that each article's beginning saves.
        """
        reader, succession = self._reader, self._succession
        assert reader.rule is not None
        memory = LongTermMemory(reader.model, self._fisher, setting)
        go_on = (reader.model, reader.rule, reader.segment)
        read = read_in_succession(*go_on, self._texts[: len(succession.first)], memory)
        found: Found = {
            "setting": asdict(setting),
            "static, valid": self._against_home(self._then, memory),
            "static, old": self._against_home(self._old, memory),
            "moved": memory.moved(),
        }
        half_way(memory, found)
        read += read_in_succession(*go_on, self._texts[len(succession.first) :], memory)
        found["static, old, at the end"] = self._against_home(self._old, memory)
        for group, of_group in self._groups.items():
            for tokens in succession.beginnings:
                saved = num_nats(self._reset, tokens) - num_nats(read, tokens)
                words = num_words(succession.articles, tokens)
                found[f"gain, {group}, {tokens}"] = _interval(saved[of_group], words[of_group])
        shown = succession.shown
        found["gains"] = (num_nats(self._reset, shown) - num_nats(read, shown)).tolist()
        return found

    def _static(self, articles: Sequence[Article], tokens: int) -> _Static:
        texts = beginnings(articles, tokens)
        return _Static(texts, static_nats(self._reader.model, texts), num_words(articles, tokens))

    def _against_home(self, static: _Static, memory: LongTermMemory) -> Interval:
        """Perplexity over that with the weights as they were trained."""
        now = static_nats(memory.model(self._reader.model), static.texts)
        return _interval(now - static.nats, static.words).map(lambda nats: float(np.exp(nats)))

    def _perplexity(self, of_group: NDArray[np.bool_], tokens: int) -> float:
        words = num_words(self._succession.articles, tokens)[of_group].sum()
        return float(np.exp(num_nats(self._reset, tokens)[of_group].sum() / max(words, 1)))


def _groups(
    num_first: int, num_then: int, alike: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    """Which of all articles, in reading order, are in each group, bool [articles]."""
    place = np.repeat([1, 2], [num_first, num_then])
    return {
        "valid, related": (place == 2) & alike,
        "valid, not related": (place == 2) & ~alike,
        "valid": place == 2,
        "held-out B, related": (place == 1) & alike,
        "held-out B, not related": (place == 1) & ~alike,
        "held-out B": place == 1,
        "both, related": alike,
        "both, not related": ~alike,
    }


def _interval(nats: NDArray[np.float64], words: NDArray[np.float64]) -> Interval:
    """Nats per word with the interval of a bootstrap over articles; nan for no article."""
    if len(nats) == 0:
        return Interval(float("nan"), None, None)
    return ratio_intervals(nats, words)[0]
