import math

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import CacheMemory
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.meta.update_rule import AbstractUpdateRule

pytestmark = pytest.mark.parametrize(
    ("cell", "cutoffs"), [("lstm", ()), ("qrnn", ()), ("lstm", (4, 7))], ids=str
)

KINDS = ("static", "gradient descent", "rms decay", "learned rates")
SEGMENT = 4


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_equals_a_hand_written_loop(tiny_model, texts, learning, plain_read, kind, rows):
    model = tiny_model()
    rule, update = learning(kind, model)
    names = [name for name, _ in model.named_parameters()]
    readings = Reader(model, rule, names, SEGMENT).read(texts, rows)
    assert sum(readings.fallbacks) == 0
    for text, nats in zip(texts, readings.nats, strict=True):
        expected, _ = plain_read(model, text, SEGMENT, update)
        np.testing.assert_allclose(nats, expected, rtol=1e-10)
    if rule is not None:
        static = Reader(model).read(texts).nats
        assert max(abs(a - b).max() for a, b in zip(static, readings.nats, strict=True)) > 0.05


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("surprise", [0.25, 2.0])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_surprising_tokens_weigh_more(
    tiny_model, texts, learning, plain_read, kind, surprise, rows
):
    model = tiny_model()
    rule, update = learning(kind, model)
    names = [name for name, _ in model.named_parameters()]
    readings = Reader(model, rule, names, SEGMENT, surprise=surprise).read(texts, rows)
    for text, nats in zip(texts, readings.nats, strict=True):
        expected, _ = plain_read(model, text, SEGMENT, update, surprise=surprise)
        np.testing.assert_allclose(nats, expected, rtol=1e-10)


@pytest.mark.parametrize("names", [("embedding.weight",), ("decoder.bias", "layers.1.input_bias")])
@pytest.mark.parametrize("rows", [1, 2])
def test_only_the_named_parameters_learn(tiny_model, texts, learning, plain_read, names, rows):
    model = tiny_model()
    rule, update = learning("rms decay", model, names)
    readings = Reader(model, rule, names, SEGMENT).read(texts, rows)
    for text, nats in zip(texts, readings.nats, strict=True):
        expected, _ = plain_read(model, text, SEGMENT, update, names)
        np.testing.assert_allclose(nats, expected, rtol=1e-10)


class Momentum(AbstractUpdateRule):
    """A rule with a state: v <- 0.8 v + g, W <- W - 0.5 v."""

    def initial_state(self, fast):
        return {name: torch.zeros_like(weight) for name, weight in fast.items()}

    def forward(self, fast, gradients, slow, state, coefficients=None):
        state = {name: 0.8 * state[name] + gradient for name, gradient in gradients.items()}
        return {name: weight - 0.5 * state[name] for name, weight in fast.items()}, state


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_state_of_a_rule_begins_anew_with_each_article(tiny_model, texts, plain_read, rows):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    readings = Reader(model, Momentum(), names, SEGMENT).read(texts, rows)
    for text, nats in zip(texts, readings.nats, strict=True):
        velocity = {}

        def update(name, weight, gradient, slow, velocity=velocity):
            velocity[name] = 0.8 * velocity.get(name, 0.0) + gradient
            return weight - 0.5 * velocity[name]

        expected, _ = plain_read(model, text, SEGMENT, update)
        np.testing.assert_allclose(nats, expected, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["static", "gradient descent"])
def test_the_cache_sees_the_features_of_the_reading(
    tiny_model, texts, learning, plain_read, kind, rows
):
    model = tiny_model()
    rule, update = learning(kind, model)
    names = [name for name, _ in model.named_parameters()]
    grid = CacheGrid(thetas=(0.25, 2.0), window=6)
    readings = Reader(model, rule, names, SEGMENT, grid, confidence=True).read(texts, rows)
    without = Reader(model, rule, names, SEGMENT).read(texts, rows)
    for number, text in enumerate(texts):
        _, features = plain_read(model, text, SEGMENT, update)
        tokens = torch.from_numpy(text.astype(np.int64))
        expected = CacheMemory(6).score(
            features, tokens, torch.tensor(grid.thetas), confidence=True
        )
        found = readings.cache[number]
        np.testing.assert_allclose(found, expected.log_probabilities, rtol=1e-9)
        found = readings.confidence[number]
        np.testing.assert_allclose(found[2:], expected.confidence, rtol=1e-5)
        assert len(found) == 2 + len(expected.confidence)
        np.testing.assert_array_equal(readings.nats[number], without.nats[number])
    assert without.cache == without.confidence == []


def test_a_model_is_as_sure_as_its_scores_of_every_token(tiny_model, texts):
    model = tiny_model()
    reader = Reader(model, segment=SEGMENT, confidence=True)
    (found,) = reader.read(texts[:1]).confidence
    size = model.config.vocabulary_size
    for place in (0, 1, len(texts[0]) - 1):
        said = []
        for token in range(size):
            text = texts[0][: place + 1].copy()
            text[place] = token
            said.append(-float(reader.read([text]).nats[0][place]))
        entropy = -sum(math.exp(log) * log for log in said)
        np.testing.assert_allclose(found[:, place], [max(said), entropy], rtol=1e-6)


def test_the_segment_length_does_not_change_static_scores(tiny_model, texts):
    model = tiny_model()
    one, other, whole = (Reader(model, segment=s).read(texts, 2).nats for s in (1, 4, 99))
    for a, b, c in zip(one, other, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
        np.testing.assert_allclose(a, c, rtol=1e-12)


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(tiny_model, texts):
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    model.start_from_frequencies(torch.zeros(11, dtype=torch.float64))  # all alike
    readings = Reader(model).read(texts, 3)
    assert readings.num_tokens == sum(map(len, texts)) == 36
    assert math.isclose(readings.total, 36 * math.log(11), rel_tol=1e-14)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_token_is_scored_once(tiny_model, texts, learning, rows):
    model = tiny_model()
    rule, _ = learning("gradient descent", model)
    told = []
    names = ("decoder.bias",)
    readings = Reader(model, rule, names, SEGMENT).read(texts, rows, lambda *p: told.append(p))
    assert [len(nats) for nats in readings.nats] == [len(text) for text in texts]
    assert all(np.isfinite(nats).all() for nats in readings.nats)
    assert sum(tokens for tokens, _ in told) == readings.num_tokens == 36
    assert math.isclose(sum(nats for _, nats in told), readings.total)
    assert readings.seconds > 0


def test_reading_changes_neither_the_model_nor_its_mode(tiny_model, texts, learning):
    model = tiny_model(input_dropout=0.5, weight_dropout=0.5).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rule, _ = learning("learned rates", model)
    reader = Reader(model, rule, [name for name, _ in model.named_parameters()], SEGMENT)
    first, second = reader.read(texts, 2), reader.read(texts, 2)
    assert model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    for one, other in zip(first.nats, second.nats, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_to_read_gives_nothing(tiny_model):
    readings = Reader(tiny_model()).read([])
    assert readings.nats == []
    assert readings.num_tokens == 0


def test_a_text_of_one_token(tiny_model, plain_read):
    model, text = tiny_model(), np.array([4], np.int32)
    (nats,) = Reader(model, cache=CacheGrid(thetas=(1.0,), window=3)).read([text]).nats
    np.testing.assert_allclose(nats, plain_read(model, text, 1)[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "nothing to read in text 1; expected at least one token, found none"),
        ([3, 11, 2], r"text 1 is beyond .*; expected ids in \[0, 11\), found 11 at position 1"),
        ([3, 2, -1], r"text 1 is beyond .*; expected ids in \[0, 11\), found -1 at position 2"),
    ],
)
def test_texts_that_cannot_be_read(tiny_model, text, message):
    texts = [np.array([1, 2], np.int32), np.array(text, np.int32)]
    with pytest.raises(ValueError, match=message):
        Reader(tiny_model()).read(texts)


def test_a_segment_without_tokens(tiny_model):
    with pytest.raises(ValueError, match="a segment has tokens; expected at least 1, found 0"):
        Reader(tiny_model(), segment=0)


@pytest.mark.parametrize("rows", [0, -2])
def test_reading_without_rows(tiny_model, texts, rows):
    message = f"articles are read in rows; expected at least 1, found {rows}"
    with pytest.raises(ValueError, match=message):
        Reader(tiny_model()).read(texts, rows)
