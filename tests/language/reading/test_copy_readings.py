"""Ways to learn that read one text side by side score it as each does alone."""

import dataclasses

import numpy as np
import pytest
from torch import nn

from metalm.language.reading.copy_readings import Request, read_copies
from metalm.language.reading.curves import DISTANCE, FLUSH
from metalm.language.reading.methods import Method
from metalm.language.reading.reader import CacheGrid, Reader

GRID = CacheGrid(thetas=(0.5, 2.0), window=6)
SGD = Method(
    name="sgd", model="control", learning="sgd", segment=4, settings={"rate": 0.3, "decay": 0.02}
)
RMS = SGD.with_(name="rms", learning="rms", settings={"rate": 0.1, "decay": 0.01, "eps": 0.7})
JOINT = Method(
    name="metalm",
    model="joint",
    learning="joint",
    segment=3,
    settings={"rate_scale": 1.5, "decay_scale": 2.0},
)
REQUESTS = [
    Request(JOINT, GRID),
    Request(SGD, GRID),
    Request(RMS, GRID),
    Request(Method(name="static", model="control", learning="none", segment=4), GRID),
    Request(JOINT.with_(settings={"rate_scale": 0.5, "decay_scale": 1.0}), GRID),
    Request(SGD.with_(segment=5), GRID),
    Request(SGD, None),
    Request(RMS.with_(settings={"rate": 0.2, "decay": 0.01, "eps": 0.7}), GRID),
    Request(RMS.with_(settings={**RMS.settings, "surprise": 0.5}), GRID),
    Request(SGD.with_(settings={**SGD.settings, "surprise": 0.5}), GRID),
    Request(RMS.with_(learning="rms-flush"), GRID),
    Request(RMS.with_(learning="rms-flush", settings={**RMS.settings, "rate": 0.2}), GRID),
]


class Sevens(nn.Module):
    """Stands for the network: an article begins at every 7."""

    def forward(self, windows):
        return (windows[..., -1] == 7).float() - 0.5


@pytest.fixture
def text():
    return np.random.default_rng(3).integers(0, 11, 30).astype(np.int32)


def alone(models, request, texts):
    method, grid = request
    reader = Reader(
        models.model(method),
        models.rule(method),
        models.fast_names(method),
        method.segment,
        grid,
        confidence=True,
        surprise=method.settings.get("surprise", 0.0),
    )
    return reader.read(texts)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [[place] for place in range(12)]),
        (2, [[0, 4], [1, 2], [7], [3], [5], [6], [8, 9], [10, 11]]),
        (8, [[0, 4], [1, 2, 7], [3], [5], [6], [8, 9], [10, 11]]),
    ],
)
def test_methods_of_one_model_and_segment_read_a_text_side_by_side(models, text, rows, expected):
    models.statistics[5] = models.statistics[4]
    models = dataclasses.replace(models, starts=Sevens())
    assert 7 in text[:-4]
    told = []
    found = list(
        read_copies(
            models,
            REQUESTS,
            [text],
            rows,
            confidence=True,
            curves=True,
            progress=lambda name, total: lambda tokens, nats: told.append((name, total, tokens)),
        )
    )
    assert [places for places, _ in found] == expected
    assert sum(tokens for _, _, tokens in told) == len(REQUESTS) * len(text)
    for name, total in {(name, total) for name, total, _ in told}:
        assert total % len(text) == 0
        assert (" more" in name) == (total > len(text))
    for places, several in found:
        for place, readings in zip(places, several, strict=True):
            own = alone(models, REQUESTS[place], [text])
            np.testing.assert_allclose(readings.nats, own.nats, rtol=1e-9)
            np.testing.assert_allclose(readings.cache, own.cache, rtol=1e-9)
            np.testing.assert_allclose(readings.confidence, own.confidence, rtol=1e-5)
            assert readings.fallbacks == [0]
            assert readings.seconds > 0
            learning = REQUESTS[place].method.learning
            noted = [DISTANCE] * (learning != "none") + [FLUSH] * learning.endswith("flush")
            assert [curve.quantity for curve in readings.curves] == noted
            assert all(len(curve.places) == 1 for curve in readings.curves)
            for curve in readings.curves[1:]:
                assert set(curve.values[0].flatten().tolist()) == {0.0, 1.0}


def test_several_texts_are_read_by_one_method_after_the_other(models, text):
    texts = [text[:9], text[9:]]
    found = list(read_copies(models, REQUESTS[:3], texts, 2))
    assert [places for places, _ in found] == [[0], [1], [2]]
    for (place,), (readings,) in found:
        own = alone(models, REQUESTS[place], texts)
        for one, other in zip(readings.nats, own.nats, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
