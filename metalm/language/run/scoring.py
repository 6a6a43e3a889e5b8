"""Reading a split with every method.

The static model, the rivals and metalm go through the same `Reader`; a method with a cache whose
other settings are those of a method without one shares its reading, and so do fast copies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metalm.analysis.statistics.scores import ArticleScores, Scores
from metalm.analysis.statistics.tempered import Tempered
from metalm.analysis.statistics.traces import QUANTITIES, Trace
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.copy_readings import Begin, Request, Texts, read_copies
from metalm.language.reading.curves import Curves, along_articles
from metalm.language.reading.methods import ALL_BUT_RECURRENT, Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Readings
from metalm.language.reading.store import ReadingStore
from metalm.language.reading.unfinished import Unfinished
from metalm.language.run.mixtures import Mixtures
from metalm.language.run.temperatures import Temperatures, at_temperature
from metalm.language.text.articles import Article, ArticleSet
from metalm.language.text.vocabulary import UNKNOWN, split_words
from metalm.language.tuning.tuning_text import Mode
from metalm.meta.parameters import choose


class Scored(NamedTuple):
    """What evaluating one mode gives."""

    scores: Scores
    """For `metalm.analysis`."""
    fallbacks: dict[str, int]
    """Method -> how often fast weights blew up and fell back to W_0, over all its copies."""
    traces: list[Trace]
    """What was recorded of the fast weights of the methods that learn."""
    tempered: Tempered | None = None
    """The same words under temperatures of the methods' own, where they have some."""


def score_split(
    models: TrainedModels,
    methods: Sequence[Method],
    articles: ArticleSet,
    mode: Mode,
    store: ReadingStore,
    rows: int = 1,
    progress: Begin | None = None,
    mixtures: Mixtures | None = None,
    unknown: int | None = None,
    temperatures: Temperatures | None = None,
    *,
    bfloat16: bool = False,
) -> Scored:
    """Reads every article of a split with every method.

    Args:
        models: the trained weights.
        methods: what is compared; the first is the static model.
        articles: the split.
        mode: "reset" at each article, or "carry" on across articles.
        store: where finished readings are kept.
        rows: articles read at once (reset), or methods side by side (carry); the scores do not
            depend on it.
        progress: told of every reading as it begins.
        mixtures: the networks of the methods that have one.
        unknown: the token that stands for every unknown word; such a word is called "<unk>" in the
            scores, so that they say how many there are.
        temperatures: under which the methods are scored once more.
        bfloat16: whether every method reads with matrix products in bfloat16 (`Reader`).
    """
    lengths = articles.lengths.tolist()
    losses: dict[str, list[NDArray[np.float64]]] = {}
    fallbacks: dict[str, int] = {}
    traces: list[Trace] = []
    words = [article.words for article in articles]
    groups = _sharing_a_reading(methods)
    requests = _requests(models, groups, side_by_side=mode == "carry")
    texts: list[NDArray[np.int32]] = [article.tokens for article in articles]
    if mode == "carry":
        texts = [np.concatenate(texts)]
    warm = temperatures or Temperatures((), {})
    found = _read_or_recall(
        models, list(requests.values()), texts, store, rows, progress, warm.grid, bfloat16
    )
    read = dict(zip(requests, found, strict=True))
    for key, group in groups.items():
        if any(len(method.multiples) == 1 for method in group):
            name = requests[key].method.name
            traces += _traces(name, read[key].readings.curves, words)
    for method in methods:
        copies = [read[_key(copy)] for copy in method.copies()]
        losses[method.name] = _split_at(_nats(copies, method, mixtures or {}), lengths)
        fallbacks[method.name] = sum(sum(copy.readings.fallbacks) for copy in copies)
    tempered = {}
    for method in methods:
        if method.name in warm.chosen:
            place = warm.grid.index(warm.chosen[method.name])
            copies = [read[_key(copy)].at_temperature(place) for copy in method.copies()]
            tempered[method.name] = _split_at(_nats(copies, method, {}), lengths)
    return Scored(
        _scores(articles, losses, unknown),
        fallbacks,
        traces,
        Tempered(temperatures=dict(warm.chosen), scores=_scores(articles, tempered, unknown))
        if tempered
        else None,
    )


def _scores(
    articles: ArticleSet, losses: Mapping[str, Sequence[NDArray[np.float64]]], unknown: int | None
) -> Scores:
    """Of every method and article, from the losses of their tokens."""
    scored = tuple(
        _article_scores(article, {name: of[number] for name, of in losses.items()}, unknown)
        for number, article in enumerate(articles)
    )
    return Scores(methods=tuple(losses), articles=scored)


def _traces(
    method: str, curves: Sequence[Curves], words: Sequence[NDArray[np.int32]]
) -> list[Trace]:
    """A trace a quantity and tensor, at words instead of tokens."""
    traces = []
    for curve in curves:
        _, names, places, values = along_articles(curve, [len(of_article) for of_article in words])
        read = [
            of_article[place - 1].astype(np.float64) + 1
            for of_article, place in zip(words, places, strict=True)
        ]
        traces += [
            Trace(
                method=method,
                quantity=QUANTITIES[curve.quantity],
                name=name,
                words=read,
                values=[value[:, number].astype(np.float64) for value in values],
            )
            for number, name in enumerate(names)
        ]
    return traces


class _Read(NamedTuple):
    """A finished reading."""

    readings: Readings
    grid: CacheGrid | None

    def at_temperature(self, place: int) -> _Read:
        """The same, scored under one of its temperatures."""
        return self._replace(readings=at_temperature(self.readings, place))


def _read_or_recall(
    models: TrainedModels,
    requests: Sequence[Request],
    texts: Texts,
    store: ReadingStore,
    rows: int,
    progress: Begin | None,
    temperatures: Sequence[float],
    bfloat16: bool,
) -> list[_Read]:
    """The reading of every request, from the store if it was finished there."""
    lengths = [len(text) for text in texts]
    descriptions = [
        _description(models, request, texts, temperatures, bfloat16) for request in requests
    ]
    found = [store.get(description, lengths) for description in descriptions]
    missing = [place for place, one in enumerate(found) if one is None]

    def unfinished(places: Sequence[int]) -> Unfinished:
        return store.unfinished([descriptions[missing[place]] for place in places])

    for places, several in read_copies(
        models,
        [requests[place] for place in missing],
        texts,
        rows,
        confidence=True,
        temperatures=temperatures,
        curves=True,
        bfloat16=bfloat16,
        progress=progress,
        unfinished=unfinished,
    ):
        for number, readings in zip(places, several, strict=True):
            store.put(descriptions[missing[number]], readings)
            found[missing[number]] = readings
        unfinished(places).forget()
    store.forget_unfinished()
    return [
        _Read(readings, request.grid)
        for readings, request in zip(found, requests, strict=True)
        if readings is not None
    ]


def _description(
    models: TrainedModels,
    request: Request,
    texts: Texts,
    temperatures: Sequence[float],
    bfloat16: bool,
) -> dict[str, Any]:
    """Everything that a reading's scores depend on."""
    method, grid = request
    model, rule = models.model(method), models.rule(method)
    described = {
        "text": _checksum(texts),
        "weights": _checksum(_numbers(model) + ([] if rule is None else _numbers(rule))),
        "model": method.model,
        "learning": method.learning,
        "segment": method.segment,
        "settings": dict(sorted(method.settings.items())),
        "cache": None if grid is None else [list(grid.thetas), grid.window],
        "confidence": True,
    }
    # Named where they are not as usual: so readings from before there was a choice are found.
    fast = models.fast_names(method)
    described |= {"fast": list(fast)} if fast and fast != choose(model, ALL_BUT_RECURRENT) else {}
    described |= {"temperatures": list(temperatures)} if temperatures else {}
    return described | ({"bfloat16": True} if bfloat16 else {})


def _numbers(module: torch.nn.Module) -> list[NDArray[np.generic]]:
    return [tensor.cpu().numpy() for tensor in module.state_dict().values()]


def _checksum(arrays: Sequence[NDArray[np.generic]]) -> str:
    """SHA-256 over every array's type, shape and bytes: where one ends counts too."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(json.dumps([str(array.dtype), list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _article_scores(
    article: Article, losses: Mapping[str, NDArray[np.float64]], unknown: int | None
) -> ArticleScores:
    """Token losses summed into words."""
    words = split_words(article.text)
    if unknown is not None:
        for place in article.words[article.tokens == unknown].tolist():
            words[place] = UNKNOWN
    return ArticleScores(
        title=article.title,
        words=words,
        losses={
            name: np.bincount(article.words, nats, minlength=len(words)).astype(np.float64)
            for name, nats in losses.items()
        },
    )


def _sharing_a_reading(methods: Sequence[Method]) -> dict[str, list[Method]]:
    """Methods that have a fast copy in common, by its key; those of one copy first."""
    groups: dict[str, list[Method]] = {}
    for method in sorted(methods, key=lambda method: len(method.multiples)):
        for copy in method.copies():
            groups.setdefault(_key(copy), []).append(method)
    return groups


def _key(copy: Method) -> str:
    """What a reading depends on, but for its cache."""
    return json.dumps([copy.model, copy.learning, copy.segment, sorted(copy.settings.items())])


def _requests(
    models: TrainedModels, groups: Mapping[str, Sequence[Method]], *, side_by_side: bool
) -> dict[str, Request]:
    """What is read for each key: a copy, and the probabilities of every cache that is mixed in.

    Where methods may be read side by side, those with one model and length of segments get the
    same, as `read_copies` wants it.
    """

    def family(key: str) -> object:
        method = groups[key][0]
        return (id(models.model(method)), method.segment) if side_by_side else key

    beside: dict[object, list[CacheConfig]] = {}
    for key, group in groups.items():
        caches = [method.cache for method in group if method.cache is not None]
        beside.setdefault(family(key), []).extend(caches)
    return {
        key: Request(_copy_of(group[0], key), _grid(beside[family(key)]))
        for key, group in groups.items()
    }


def _copy_of(method: Method, key: str) -> Method:
    (copy,) = [copy for copy in method.copies() if _key(copy) == key]
    return copy


def _grid(caches: Sequence[CacheConfig]) -> CacheGrid | None:
    if not caches:
        return None
    thetas = tuple(sorted({cache.theta for cache in caches}))
    windows = {cache.window for cache in caches}
    if len(windows) > 1:
        raise ValueError(
            "one reading keeps one cache; expected the same window for all methods that share it, "
            f"found {sorted(windows)}; give them one window"
        )
    return CacheGrid(thetas=thetas, window=windows.pop())


def _nats(copies: Sequence[_Read], method: Method, mixtures: Mixtures) -> list[NDArray[np.float64]]:
    readings = [copy.readings for copy in copies]
    network = mixtures[method.name] if method.learned_mixture else None
    if method.cache is None:
        return nats_of_copies(readings, network=network)
    grid = copies[-1].grid
    assert grid is not None
    theta = grid.thetas.index(method.cache.theta)
    return nats_of_copies(readings, theta, method.cache.share, network)


def _split_at(
    texts: Sequence[NDArray[np.float64]], lengths: Sequence[int]
) -> list[NDArray[np.float64]]:
    """The losses of each article, from texts that are articles or all of them laid end to end."""
    whole = np.concatenate(texts)
    return np.split(whole, np.cumsum(lengths)[:-1])
