"""On articles whose best possible losses are known: learning while reading gains, within bounds."""

import numpy as np
import pytest
import torch

from data_prep.prepared import write
from data_prep.synthetic import SyntheticText, best_losses, expected_gains, synthetic_source
from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.reading.cache import mixed_nats
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.text.articles import open_corpus
from metalm.language.training.base_training import BaseTraining, BaseTrainingConfig, one_cycle
from metalm.language.training.statistics import token_counts
from metalm.meta.rules.gradient_descent import GradientDescent

SETTINGS = SyntheticText(
    num_names=30,
    cast_size=3,
    num_verbs=2,
    num_lines=40,
    num_articles={"train": 60, "valid": 1, "test": 6},
)
# Under the true distribution a reader beats the best one by so many nats with probability e^-14.
LUCK = 14.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "synthetic"
    write(synthetic_source(SETTINGS), folder, "word", 0)
    return open_corpus(folder)


@pytest.fixture(scope="module")
def model(corpus):
    """Knows the language: trained for 120 steps."""
    torch.manual_seed(1)
    size = corpus.vocabulary.size
    sizes = {"vocabulary_size": size, "embedding_size": 16, "hidden_size": 24, "num_layers": 1}
    dropout = dict.fromkeys(("input_dropout", "hidden_dropout", "output_dropout"), 0.0)
    model = LanguageModel(ModelConfig(**sizes, **dropout))
    with torch.no_grad():
        model.embedding.weight.mul_(10)
    model.start_from_frequencies(token_counts(corpus.train, size))
    config = BaseTrainingConfig(rows=16, window=15, learning_rate=0.04, clip=1.0, bfloat16=False)
    training = BaseTraining(
        model, corpus.train, config, lambda index: one_cycle(index / 120, 0.1, 0.01), 1
    )
    for index in range(120):
        training.step(index)
    return model.eval()


@pytest.fixture(scope="module")
def optimum(corpus):
    """Best total losses of the test articles, with and without memory."""
    best = [best_losses(article.text, SETTINGS) for article in corpus.test]
    return tuple(float(sum(part.sum() for part in side)) for side in zip(*best, strict=True))


def read(model, corpus, rule, mode="reset"):
    texts = [article.tokens for article in corpus.test]
    if mode == "carry":
        texts = [np.concatenate(texts)]
    names = ("embedding.weight", "decoder.bias")
    grid = CacheGrid(thetas=(1.0,), window=60)
    return Reader(model, rule, names, 10, grid).read(texts, 6)


def test_a_word_is_a_token(corpus):
    for article in corpus.test:
        np.testing.assert_array_equal(article.words, np.arange(5 * SETTINGS.num_lines))


def test_adaptation_gains_and_does_not_beat_the_optimum(model, corpus, optimum):
    with_memory, without_memory = optimum
    possible = without_memory - with_memory
    assert abs(possible - 6 * expected_gains(SETTINGS).sum()) < 0.1 * possible
    static = read(model, corpus, None)
    adapted = read(model, corpus, GradientDescent(1.0, 0.02))
    assert sum(adapted.fallbacks) == 0
    # The static model knows the language: it pays little more than a reader without memory.
    assert static.total < 1.05 * without_memory
    assert static.total > with_memory - LUCK
    assert static.total - adapted.total > 0.4 * possible
    assert adapted.total > with_memory - LUCK


@pytest.mark.parametrize("rule", [None, GradientDescent(1.0, 0.02)], ids=["cache", "both"])
def test_the_cache_gains_and_does_not_beat_the_optimum(model, corpus, optimum, rule):
    with_memory, without_memory = optimum
    readings = read(model, corpus, rule)
    mixed = sum(
        float(mixed_nats(torch.from_numpy(n), torch.from_numpy(c[0]), 0.3).sum())
        for n, c in zip(readings.nats, readings.cache, strict=True)
    )
    static = read(model, corpus, None).total
    assert static - mixed > 0.1 * (without_memory - with_memory)
    assert mixed > with_memory - LUCK


def test_the_gain_grows_along_the_article(model, corpus):
    static = read(model, corpus, None)
    adapted = read(model, corpus, GradientDescent(1.0, 0.02))
    gain = np.mean([a - b for a, b in zip(static.nats, adapted.nats, strict=True)], axis=0)
    assert gain[:10] == pytest.approx(0, abs=1e-6)
    assert gain[100:].mean() > gain[:100].mean() > 0
