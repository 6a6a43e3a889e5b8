"""Choosing how far W_0 follows what was read, and how firmly it is held, on articles of their own.

Wanted is a good beginning: a setting gains what later articles' beginnings cost less, read static,
before anything is learnt from them. Forbidden is forgetting: other articles, re-read static in the
end, must not cost more than before. Every article that is consolidated is read once only, from
home, and taken to go as far from any other W_0, so that a setting costs no reading with learning.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metalm.language.memory.consolidation import (
    ConsolidationConfig,
    LongTermMemory,
    read_in_succession,
)
from metalm.language.reading.beginnings import Texts, beginnings, num_words, static_nats
from metalm.language.reading.reader import Reader
from metalm.language.text.articles import Article
from metalm.meta.parameters import Parameters

CARRY = ConsolidationConfig(share=1.0, elasticity=0.0)
"""The fast weights simply go on."""


@dataclass(frozen=True, kw_only=True)
class ConsolidationTrial:
    """What a share and an elasticity did."""

    share: float
    """See `ConsolidationConfig`."""
    elasticity: float
    """See `ConsolidationConfig`."""
    gain: float
    """Nats a word that the beginnings cost less, read static."""
    forgotten: float
    """Nats a word that the other articles cost more in the end, re-read static."""
    moved: float
    """See `LongTermMemory.moved`."""
    seconds: float
    """How long it took."""


class ChoiceText(NamedTuple):
    """What the choice rests on."""

    articles: Sequence[Article]
    """Read and consolidated one after the other; their beginnings show the gain."""
    others: Sequence[Article]
    """Re-read static, to see what is forgotten."""
    beginning: int
    """Tokens of a beginning."""
    tokens: int
    """Tokens that are read of each article, of either kind."""


def try_settings(
    reader: Reader,
    fisher: Mapping[str, Tensor],
    text: ChoiceText,
    settings: Iterable[ConsolidationConfig],
) -> Iterator[ConsolidationTrial]:
    """Tries one setting after the other, each from home.

    Args:
        reader: the trained model and its rule; not changed.
        fisher: of the training set (`training_fisher`).
        text: what is read.
        settings: to try.
    """
    starts, guard = beginnings(text.articles, text.beginning), beginnings(text.others, text.tokens)
    words = num_words(text.articles, text.beginning).sum()
    guard_words = num_words(text.others, text.tokens).sum()
    without = static_nats(reader.model, starts).sum() / words
    before = static_nats(reader.model, guard).sum() / guard_words
    steps = displacements(reader, fisher, beginnings(text.articles, text.tokens))
    for setting in settings:
        started = time.time()
        memory = LongTermMemory(reader.model, fisher, setting)
        nats = 0.0
        for start, step in zip(starts, steps, strict=True):
            nats += static_nats(memory.model(reader.model), [start]).sum()
            memory.keep({name: memory.slow[name] + part for name, part in step.items()})
        after = static_nats(memory.model(reader.model), guard).sum() / guard_words
        yield ConsolidationTrial(
            share=setting.share,
            elasticity=setting.elasticity,
            gain=float(without - nats / words),
            forgotten=float(after - before),
            moved=memory.moved(),
            seconds=time.time() - started,
        )


def displacements(reader: Reader, fisher: Mapping[str, Tensor], texts: Texts) -> list[Parameters]:
    """W_T - W_0 of each text, read from home."""
    assert reader.rule is not None
    found = []
    for text in texts:
        memory = LongTermMemory(reader.model, fisher, CARRY)
        read_in_succession(reader.model, reader.rule, reader.segment, [text], memory)
        found.append({name: memory.slow[name] - home for name, home in memory.home.items()})
    return found


def choose_consolidation(
    trials: Sequence[ConsolidationTrial],
) -> dict[str, ConsolidationConfig]:
    """The best setting with a penalty, and what it is to be compared with, by name.

    Best is the highest gain among those that forget nothing, or else the least forgotten. The
    others are the same share without a penalty, the best without a penalty, and plain carry.

    Raises:
        ValueError: no trial with a penalty, or none without.
    """
    elastic = _best([trial for trial in trials if trial.elasticity > 0])
    return {
        "elastic": elastic,
        "same share, no penalty": ConsolidationConfig(share=elastic.share, elasticity=0.0),
        "no penalty, own share": _best([trial for trial in trials if trial.elasticity == 0]),
        "plain carry": CARRY,
    }


def _best(trials: Sequence[ConsolidationTrial]) -> ConsolidationConfig:
    if not trials:
        raise ValueError(
            "nothing to choose from; expected trials with an elasticity above 0 and with 0, found "
            "none of one kind; try both"
        )
    harmless = [trial for trial in trials if trial.forgotten <= 0.0]
    found = (
        max(harmless, key=lambda trial: trial.gain)
        if harmless
        else min(trials, key=lambda trial: trial.forgotten)
    )
    return ConsolidationConfig(share=found.share, elasticity=found.elasticity)
