"""Caches that are asked for many tokens at once, as on a GPU, say what they say one by one."""

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import asked_together
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.reading.unfinished import Unfinished
from metalm.meta.rules.gradient_descent import GradientDescent

SEGMENT = 4


@pytest.fixture
def texts():
    random = np.random.default_rng(5)
    return [random.integers(0, 11, length).astype(np.int32) for length in (37, 5, 60, 22)]


def reader_of(model, lost_at=None):
    """A reader whose row 0 is lost at some segment."""
    names = [name for name, _ in model.named_parameters()]
    grid = CacheGrid(thetas=(0.3, 1.0), window=13)
    reader = Reader(model, GradientDescent(0.1), names, SEGMENT, grid, confidence=True)
    step, segments = reader.step, []

    def losing(batch, memory):
        segments.append(batch)
        found = step(batch, memory)
        if len(segments) == lost_at:
            found.lost[0] = True
        return found

    reader.step = losing
    return reader


def same(found, expected):
    assert found.fallbacks == expected.fallbacks
    for part in ("nats", "cache", "confidence"):
        for one, other in zip(getattr(found, part), getattr(expected, part), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("together", [2, 7, 12, 1000])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lost_at", [None, 3, 6])
def test_answers_do_not_depend_on_how_many_are_asked_for(
    tiny_model, texts, monkeypatch, together, rows, lost_at
):
    model = tiny_model()
    expected = reader_of(model, lost_at).read(texts, rows)
    assert sum(expected.fallbacks) == (lost_at is not None)
    monkeypatch.setattr("metalm.language.reading.standing.asked_together", lambda device: together)
    same(reader_of(model, lost_at).read(texts, rows), expected)


def test_nothing_is_lost_where_a_reading_is_stopped(tiny_model, texts, monkeypatch, tmp_path):
    model = tiny_model()
    expected = reader_of(model).read(texts, 2)
    monkeypatch.setattr("metalm.language.reading.standing.asked_together", lambda device: 1000)

    def stop(tokens, nats):
        done.append(tokens)
        if sum(done) > 40:
            raise KeyboardInterrupt

    done = []
    kept = Unfinished(tmp_path / "kept.safetensors", {}, every=0.0)
    with pytest.raises(KeyboardInterrupt):
        reader_of(model).read(texts, 2, stop, unfinished=kept)
    assert kept.found() is not None
    same(reader_of(model).read(texts, 2, unfinished=kept), expected)


def test_a_gpu_is_asked_for_many():
    assert asked_together(torch.device("cuda")) > asked_together(torch.device("cpu")) == 1
