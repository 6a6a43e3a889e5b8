"""Each method is measured by itself, with the cache and the notes that it needs and no others."""

import math

import pytest

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.methods import Method
from metalm.language.reading.reader import CacheGrid
from metalm.language.run import reading_cost
from metalm.language.run.reading_cost import reading_costs

CACHE = CacheConfig(theta=0.5, share=0.1, window=6)
STATIC = Method(name="static", model="control", learning="none", segment=5)
SGD = Method(
    name="sgd", model="control", learning="sgd", segment=4, settings={"rate": 0.3, "decay": 0.02}
)
TWO = SGD.with_(name="two", multiples=(2.0, 1.0), cache=CACHE)
METHODS = [
    STATIC,
    STATIC.with_(name="cache", cache=CACHE),
    SGD,
    TWO,
    TWO.with_(name="learned", learned_mixture=True),
]
# tokens a second, by rate, cache and notes
SPEEDS = {
    (None, False, False): 100.0,
    (None, True, False): 50.0,
    (0.3, False, False): 20.0,
    (0.6, False, False): 30.0,
    (0.3, True, False): 10.0,
    (0.6, False, True): 4.0,
    (0.3, True, True): 2.0,
}


def test_what_is_measured(models, articles, monkeypatch):
    asked = []

    def measure(models, copy, texts, grid, *, sure, bfloat16):
        assert bfloat16
        assert grid in (None, CacheGrid(thetas=(0.5,), window=6))
        asked.append((copy.settings.get("rate"), grid is not None, sure))
        # Three segments of four, which is more than its share of the tokens.
        assert [len(text) for text in texts] == [min(12, len(a.tokens)) for a in list(articles)[:2]]
        return {"tokens_per_second": SPEEDS[asked[-1]], "peak_memory_bytes": float(len(asked))}

    monkeypatch.setattr(reading_cost, "_measure", measure)
    found = reading_costs(models, METHODS, articles, "reset", 2, tokens=6, bfloat16=True)
    assert sorted(asked, key=str) == sorted(SPEEDS, key=str)  # each once
    speeds = {name: cost["tokens_per_second"] for name, cost in found.items()}
    assert speeds == {
        "static": 100.0,
        "cache": 50.0,
        "sgd": 20.0,
        "two": pytest.approx(1 / (1 / 30 + 1 / 10)),
        "learned": pytest.approx(1 / (1 / 4 + 1 / 2)),
    }
    assert found["learned"]["peak_memory_bytes"] == 7


@pytest.mark.parametrize(("mode", "rows"), [("reset", 2), ("carry", 1)])
def test_the_measurement_reads_so_many_rows(models, articles, monkeypatch, mode, rows):
    read = reading_cost.Reader.read
    seen = []

    def noted(self, texts, number=1, *others):
        seen.append((len(texts), number))
        return read(self, texts, number, *others)

    monkeypatch.setattr(reading_cost.Reader, "read", noted)
    (cost,) = reading_costs(models, [SGD], articles, mode, 2, tokens=9).values()
    assert seen == [(rows, rows)] * 4  # once to warm up, and three times
    assert 0 < cost["tokens_per_second"] < math.inf
