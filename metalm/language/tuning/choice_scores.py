"""What a choice of fast weights gives under dynamic evaluation, at a rate found for it alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from metalm.language.reading.beginnings import Texts, beginnings, num_words
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.methods import STARTS, STEPS, Learning, Method, TrainedModels
from metalm.language.reading.reader import Reader, Readings
from metalm.language.text.articles import Article, ArticleSet
from metalm.language.tuning.fast_choices import FastModel
from metalm.language.tuning.settings_search import search
from metalm.language.tuning.trials import Settings, Trial, choose_settings, trial_to_json
from metalm.language.tuning.tune import SHRINKING
from metalm.language.tuning.tuning_text import TuningConfig, tuning_articles
from metalm.meta.parameters import Parameters

# Tokens of a segment that the settings in STARTS are for.
_START_SEGMENT = 20


class ComparedText(NamedTuple):
    """What is read, and the words that it is counted in."""

    tuned: Texts
    """What rates are found on."""
    tuned_words: Sequence[float]
    """Of each of them."""
    shown: Texts
    """What is shown: other articles."""
    shown_words: Sequence[float]
    """Of each of them."""


@dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """One choice of fast weights and one way of learning."""

    choice: str
    """Name of the choice."""
    learning: Learning
    """none, sgd or rms."""
    settings: Settings
    """Of the rule, the rate as found."""
    perplexity: float
    """Per word of what is shown."""
    bytes_kept: int
    """See `FastModel`."""
    bytes_at_work: int
    """See `FastModel`."""
    tokens_per_second: float
    """Of reading what is shown."""
    fallbacks: int
    """How often fast weights blew up meanwhile and fell back to W_0."""
    nats: Sequence[float]
    """Of each text that is shown."""
    words: Sequence[float]
    """Of each text that is shown."""
    trials: Sequence[Mapping[str, Any]]
    """Of the walk, as JSON values."""


def compared_text(
    articles: ArticleSet, *, num_tuned: int, num_shown: int, tokens: int
) -> ComparedText:
    """Beginnings of articles for the rates and of others to show, each kind spread over the split.

    Args:
        articles: the validation articles.
        num_tuned: for the rates, at most.
        num_shown: of the others, at most.
        tokens: of each, from its start.

    Raises:
        ValueError: no article is left to show.
    """
    tuned = tuning_articles(articles, TuningConfig(articles=num_tuned))
    others = articles.select([n for n in range(len(articles)) if n not in tuned])
    if not others:
        raise ValueError(
            f"nothing to show; expected more than {len(tuned)} validation articles, found "
            f"{len(articles)}; tune on fewer articles"
        )
    shown = tuning_articles(others, TuningConfig(articles=num_shown))
    kinds: list[list[Article]] = [list(articles.select(tuned)), list(others.select(shown))]
    words = [num_words(kind, tokens).tolist() for kind in kinds]
    texts = [beginnings(kind, tokens) for kind in kinds]
    return ComparedText(texts[0], words[0], texts[1], words[1])


def starting_settings(trials: Sequence[Trial], learning: Learning, segment: int) -> Settings:
    """What tuning chose for a segment length, or where the search for it begins.

    Args:
        trials: of this way of learning; may be none.
        learning: sgd or rms.
        segment: tokens between two updates.
    """
    if any(trial.segment == segment and len(trial.multiples) == 1 for trial in trials):
        return choose_settings(trials, cached=False, segment=segment).settings
    return {
        name: value * (segment / _START_SEGMENT if name in SHRINKING else 1.0)
        for name, value in STARTS[learning].items()
    }


def static_score(fast: FastModel, text: ComparedText, rows: int) -> ChoiceScore:
    """The same model with nothing fast."""
    nothing = fast._replace(names=(), bytes_kept=0, bytes_at_work=0)
    read = Reader(fast.model, segment=64).read(text.shown, rows)
    return _score("nothing", "none", nothing, {}, [], read, text)


def choice_score(
    name: str,
    learning: Learning,
    fast: FastModel,
    rms: Parameters,
    start: Settings,
    segment: int,
    text: ComparedText,
    *,
    rows: int,
    halvings: int,
) -> ChoiceScore:
    """Walks from the starting rate to the best one, and reads what is shown with it.

    Args:
        name: of the choice.
        learning: sgd or rms.
        fast: what is fast, of which model.
        rms: of the gradients of what is fast, on training text; only rms needs it.
        start: settings of the rule; all but the rate stay.
        segment: tokens between two updates.
        text: what is read.
        rows: articles read at once.
        halvings: of the walk's step (`search`).
    """
    models = TrainedModels(
        models={"control": fast.model},
        rules={},
        rival_names=fast.names,
        statistics={segment: rms},
    )

    def read(settings: Settings, texts: Texts) -> Readings:
        method = Method(
            name=name, model="control", learning=learning, segment=segment, settings=settings
        )
        return Reader(fast.model, models.rule(method), fast.names, segment).read(texts, rows)

    def evaluate(rate: Settings) -> Trial:
        settings = {**start, **rate}
        found = read(settings, text.tuned)
        perplexity = _perplexity(found, text.tuned_words)
        return Trial(
            segment=segment,
            settings=settings,
            perplexity=perplexity,
            cached_perplexity=perplexity,
            cache=CacheConfig(),
            seconds=found.seconds,
        )

    rate = {"rate": start["rate"]}
    trials = search(
        lambda rates: [evaluate(one) for one in rates],
        rate,
        {"rate": STEPS["rate"]},
        halvings=halvings,
    )
    best = choose_settings(trials, cached=False).settings
    return _score(name, learning, fast, best, trials, read(best, text.shown), text)


def _score(
    name: str,
    learning: Learning,
    fast: FastModel,
    settings: Settings,
    trials: Sequence[Trial],
    read: Readings,
    text: ComparedText,
) -> ChoiceScore:
    return ChoiceScore(
        choice=name,
        learning=learning,
        settings=dict(settings),
        perplexity=_perplexity(read, text.shown_words),
        bytes_kept=fast.bytes_kept,
        bytes_at_work=fast.bytes_at_work,
        tokens_per_second=read.num_tokens / read.seconds,
        fallbacks=sum(read.fallbacks),
        nats=[float(of_text.sum()) for of_text in read.nats],
        words=list(text.shown_words),
        trials=[trial_to_json(trial) for trial in trials],
    )


def _perplexity(read: Readings, words: Sequence[float]) -> float:
    return math.exp(min(700.0, read.total / sum(words)))
