"""The effect of consolidation, added up article by article and token by token."""

import numpy as np
import pytest
import torch

from metalm.language.memory.consolidation import (
    ConsolidationConfig,
    LongTermMemory,
    read_in_succession,
)
from metalm.language.memory.consolidation_effect import Effect, Succession
from metalm.language.reading.reader import Reader

NAMES = ("decoder.bias", "embedding.weight")
SEGMENT = 4
SETTING = ConsolidationConfig(share=0.5, elasticity=0.3)


@pytest.fixture
def fisher(tiny_model):
    own = dict(tiny_model().named_parameters())
    return {name: torch.ones_like(own[name]) for name in NAMES}


@pytest.fixture
def articles(article_set):
    """Each token a word; the last is about the same as the second, the others are not alike."""
    ids = ([1, 1, 2], [3, 4, 3, 5, 3], [0, 6, 7, 0], [9, 9, 10, 8], [3, 4, 3, 4, 5])
    return article_set([np.array(tokens, np.int32) for tokens in ids])


@pytest.fixture
def succession(articles):
    return Succession(
        first=list(articles[:2]),
        then=list(articles[2:]),
        old=[articles[0], articles[3]],
        tokens=4,
        static_tokens=5,
        beginnings=(2, 3),
        shown=3,
        related=0.5,
    )


@pytest.fixture
def reader(tiny_model, learning):
    model = tiny_model()
    rule, _ = learning("learned rates", model, NAMES)
    return Reader(model, rule, NAMES, SEGMENT)


def static(model, articles, tokens):
    texts = [article.tokens[:tokens] for article in articles]
    return np.concatenate(Reader(model).read(texts).nats)


def test_without(reader, fisher, succession):
    found = Effect(reader, fisher, succession).without()
    assert [(a["title"], a["nearest"]) for a in found["articles"]][-1] == ("article 4", 1)
    assert [a["cosine"] > 0.5 for a in found["articles"]] == [False] * 4 + [True]
    assert found["groups"] == {
        "valid, related": 1,
        "valid, not related": 2,
        "valid": 3,
        "held-out B, related": 0,
        "held-out B, not related": 2,
        "held-out B": 2,
        "both, related": 1,
        "both, not related": 4,
    }
    costs = static(reader.model, succession.then, 5)
    assert len(costs) == 4 + 4 + 5
    assert found["static perplexity"]["valid"] == pytest.approx(np.exp(costs.mean()))
    costs = static(reader.model, succession.old, 4)
    assert found["static perplexity"]["old"] == pytest.approx(np.exp(costs.mean()))
    texts = [article.tokens[:4] for article in succession.articles]
    reset = reader.read(texts).nats
    first = np.concatenate([reset[number][:3] for number in (2, 3)])
    assert found["beginnings without"]["valid, not related, 3"] == pytest.approx(
        np.exp(first.mean())
    )


def test_a_setting(reader, fisher, succession):
    told = []

    def half_way(memory, found):
        told.append((memory.num_articles, dict(found)))

    found = Effect(reader, fisher, succession).of(SETTING, half_way)
    ((count, before),) = told
    assert count == 2
    assert found.items() >= before.items()
    assert found["setting"] == {"share": 0.5, "elasticity": 0.3}

    texts = [article.tokens[:4] for article in succession.articles]
    reset = reader.read(texts).nats
    memory = LongTermMemory(reader.model, fisher, SETTING)
    nats = read_in_succession(reader.model, reader.rule, SEGMENT, texts[:2], memory)
    middle = memory.model(reader.model)
    nats += read_in_succession(reader.model, reader.rule, SEGMENT, texts[2:], memory)
    gains = [float((own[:3] - now[:3]).sum()) for own, now in zip(reset, nats, strict=True)]
    assert found["gains"] == pytest.approx(gains)
    assert found["gains"][0] == 0.0
    assert min(abs(gain) for gain in gains[1:]) > 1e-3
    for group, numbers in {"valid, not related": (2, 3), "both, related": (4,)}.items():
        saved = np.concatenate([(reset[n] - nats[n])[:2] for n in numbers])
        assert found[f"gain, {group}, 2"].estimate == pytest.approx(saved.mean())
    assert np.isnan(found["gain, held-out B, related, 2"].estimate)
    for key, articles, tokens, now in (
        ("static, valid", succession.then, 5, middle),
        ("static, old", succession.old, 4, middle),
        ("static, old, at the end", succession.old, 4, memory.model(reader.model)),
    ):
        lost = static(now, articles, tokens) - static(reader.model, articles, tokens)
        assert found[key].estimate == pytest.approx(np.exp(lost.mean()))
    assert found["static, old"].estimate != pytest.approx(found["static, old, at the end"].estimate)


def test_keeping_nothing_changes_nothing(reader, fisher, succession):
    nothing = ConsolidationConfig(share=0.0, elasticity=0.0)
    found = Effect(reader, fisher, succession).of(nothing, lambda memory, found: None)
    assert found["moved"] == 0.0
    assert found["gains"] == pytest.approx([0.0] * 5, abs=1e-12)
    assert found["static, valid"].estimate == 1.0
