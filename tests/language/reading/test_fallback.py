"""A rule that blows up in one row: caught, counted, and nobody else notices."""

import math

import numpy as np
import pytest
import torch

from metalm.language.reading.reader import CacheGrid, Reader
from metalm.meta.update_rule import AbstractUpdateRule

pytestmark = pytest.mark.parametrize("cell", ["lstm", "qrnn"])

TRIGGER, SEGMENT = 10, 4
NAMES = ("embedding.weight", "decoder.bias")


class Exploding(AbstractUpdateRule):
    """W <- W - 0.3 g; where a row has just read the trigger, its weights are multiplied."""

    def __init__(self, factor=math.nan):
        super().__init__()
        self.factor = factor

    def forward(self, fast, gradients, slow, state, coefficients=None):
        # The output bias of a token has a negative gradient where that token was read.
        read = gradients["decoder.bias"][:, TRIGGER] < 0
        new = {}
        for name, weight in fast.items():
            own = read.view(-1, *(1,) * (weight.dim() - 1))
            new[name] = torch.where(own, weight * self.factor, weight - 0.3 * gradients[name])
        return new, state


@pytest.fixture
def calm():
    """Four texts without the trigger."""
    random = np.random.default_rng(2)
    return [random.integers(0, 10, length).astype(np.int32) for length in (9, 15, 11, 6)]


@pytest.fixture
def troubled(calm):
    texts = [text.copy() for text in calm]
    texts[1][5] = TRIGGER
    return texts


def update(name, weight, gradient, slow):
    return weight - 0.3 * gradient


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_that_are_not_finite(tiny_model, calm, troubled, plain_read, factor, rows):
    model = tiny_model()
    reader = Reader(model, Exploding(factor), NAMES, SEGMENT, CacheGrid(thetas=(0.5,), window=9))
    without, found = reader.read(calm, rows), reader.read(troubled, rows)
    assert without.fallbacks == [0, 0, 0, 0]
    assert found.fallbacks == [0, 1, 0, 0]
    for number in (0, 2, 3):
        np.testing.assert_array_equal(found.nats[number], without.nats[number])
        np.testing.assert_array_equal(found.cache[number], without.cache[number])
    # The segment of the trigger, tokens 4 to 7, was scored before; from 8 on W_0 reads again.
    expected, _ = plain_read(model, troubled[1][:8], SEGMENT, update, NAMES)
    np.testing.assert_allclose(found.nats[1][:8], expected, rtol=1e-10)
    rest = troubled[1][8:]
    expected, _ = plain_read(model, rest, SEGMENT, update, NAMES, first_input=troubled[1][7])
    np.testing.assert_allclose(found.nats[1][8:], expected, rtol=1e-10)


def test_weights_that_are_finite_but_lost(tiny_model, calm, troubled):
    """One segment is scored with them; after it the row begins anew."""
    model = tiny_model()
    reader = Reader(model, Exploding(1e6), NAMES, SEGMENT)
    without, found = reader.read(calm, 4), reader.read(troubled, 4)
    assert found.fallbacks[1] >= 1
    assert np.isfinite(found.nats[1]).all()
    for number in (0, 2, 3):
        np.testing.assert_array_equal(found.nats[number], without.nats[number])


def test_a_row_whose_logits_are_not_finite_scores_as_uniform(tiny_model, calm):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.bias[3] = math.nan
    readings = Reader(model, segment=SEGMENT).read(calm, 2)
    for text, nats in zip(calm, readings.nats, strict=True):
        np.testing.assert_array_equal(nats, np.full(len(text), math.log(11)))


def test_every_explosion_is_counted(tiny_model, calm):
    texts = [text.copy() for text in calm]
    for number, place in ((0, 2), (0, 6), (1, 5), (3, 0)):
        texts[number][place] = TRIGGER
    reader = Reader(tiny_model(), Exploding(), NAMES, SEGMENT)
    assert reader.read(texts, 3).fallbacks == [2, 1, 0, 1]
    assert reader.read([np.concatenate(texts)], 1).fallbacks == [4]
