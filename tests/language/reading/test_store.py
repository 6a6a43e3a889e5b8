import shutil

import numpy as np
import pytest

from metalm.language.reading.reader import Readings
from metalm.language.reading.store import ReadingStore

DESCRIPTION = {"learning": "rms", "settings": {"rate": 0.1 + 0.2}, "cache": [[0.5, 2.0], 6]}
LENGTHS = (3, 1, 5)


@pytest.fixture
def readings():
    random = np.random.default_rng(0)
    nats = [random.random(length) for length in LENGTHS]
    cache = [random.random((2, length)) for length in LENGTHS]
    cache[0][:, 0] = np.nan
    sure = [random.random((6, length), dtype=np.float32) for length in LENGTHS]
    return Readings(nats, cache, sure, fallbacks=[2, 0], seconds=1.25)


def the_file(folder):
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("cached", [False, True])
def test_a_reading_comes_back_exactly(readings, tmp_path, cached):
    if not cached:
        readings.cache = readings.confidence = []
    ReadingStore(tmp_path / "kept").put(DESCRIPTION, readings)
    found = ReadingStore(tmp_path / "kept").get(DESCRIPTION, LENGTHS)
    assert (found.fallbacks, found.seconds) == ([2, 0], 1.25)
    kept = [(getattr(r, n) for r in (found, readings)) for n in ("nats", "cache", "confidence")]
    for one, other in kept:
        assert len(one) == len(other)
        for part, expected in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, expected)


def test_another_description_is_another_reading(readings, tmp_path):
    store = ReadingStore(tmp_path)
    assert store.get(DESCRIPTION, LENGTHS) is None
    store.put(DESCRIPTION, readings)
    assert store.get(DESCRIPTION | {"learning": "sgd"}, LENGTHS) is None


def test_every_truncation_is_refused_by_name(readings, tmp_path):
    store = ReadingStore(tmp_path)
    store.put(DESCRIPTION, readings)
    path = the_file(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{path.name} is truncated or altered.*; delete it,"):
            store.get(DESCRIPTION, LENGTHS)


def test_every_altered_byte_is_refused_by_name(readings, tmp_path):
    store = ReadingStore(tmp_path)
    store.put(DESCRIPTION, readings)
    path = the_file(tmp_path)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytes([content[place] ^ 0x20])
        path.write_bytes(content[:place] + changed + content[place + 1 :])
        with pytest.raises(ValueError, match=path.name):
            store.get(DESCRIPTION, LENGTHS)


def test_a_reading_under_the_name_of_another_is_refused(readings, tmp_path):
    store, other = ReadingStore(tmp_path / "a"), ReadingStore(tmp_path / "b")
    store.put(DESCRIPTION, readings)
    other.put(DESCRIPTION | {"learning": "sgd"}, readings)
    shutil.copy(the_file(other.folder), path := the_file(store.folder))
    message = rf"{path.name} is not the reading .*'rms'.*, found .*'sgd'.*; delete it"
    with pytest.raises(ValueError, match=message):
        store.get(DESCRIPTION, LENGTHS)
