"""Trainings and readings whose rows and texts two processes share, against one process."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from metalm.language.reading.curves import Curves
from metalm.language.reading.reader import Readings
from metalm.language.reading.shared_texts import deal, gathered
from metalm.language.reading.store import ReadingStore
from metalm.language.text.row_share import RowShare, in_turn, own_parts, own_share
from metalm.training import checkpoint, processes


def program():
    path = Path(__file__).with_name("apart.py")
    spec = importlib.util.spec_from_file_location("apart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


apart = program()
MIDDLE, STEPS = apart.MIDDLE, apart.STEPS

PUBLISHED = ("nt-asgd", "one-cycle, in parts")
QUICK = ("base", "joint, gated, in parts", "joint, a row blows up")
KINDS = [
    kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in apart.KINDS
]

# Sums in another order: a few roundings of float64, carried through six steps.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Every training in one process and one part, kept in the middle and at the end."""
    folder = tmp_path_factory.mktemp("one")
    for kind in apart.KINDS:
        training = apart.build(kind, 1)
        values = apart.go(training, kind, range(MIDDLE))
        apart.keep(folder / f"{kind} in the middle, by one", training)
        values += apart.go(training, kind, range(MIDDLE, STEPS))
        apart.keep(folder / f"{kind} at the end", training, values)
    return folder


@pytest.fixture(scope="module")
def by_two(one, run_together, tmp_path_factory):
    """Has two processes go through trainings, once; what they have left."""
    folder = tmp_path_factory.mktemp("two")
    for path in one.glob("*in the middle, by one"):
        (folder / path.name).symlink_to(path)

    def leave(kind):
        kinds = QUICK if kind in QUICK else [other for other in apart.KINDS if other not in QUICK]
        if not (folder / f"{kind} at the end").exists():
            for status, _, said in run_together(2, apart.FOUND, folder, *kinds):
                assert status == 0, said
        return folder

    return leave


def assert_same(found, expected, **close):
    tensors, meta = checkpoint.load(found)
    others, other_meta = checkpoint.load(expected)
    assert tensors.keys() == others.keys()
    assert meta["state"] == other_meta["state"]
    for name, tensor in tensors.items():
        if close and tensor.is_floating_point():
            torch.testing.assert_close(tensor, others[name], msg=name, **close)
        else:
            assert torch.equal(tensor, others[name]), name
    values, other_values = meta["values"], other_meta["values"]
    for step, other in zip(values[::-1], other_values[::-1], strict=False):
        assert step.keys() == other.keys()
        for name, value in step.items():
            np.testing.assert_allclose(value, other[name], rtol=close.get("rtol", 0), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_where_one_does(one, by_two, kind):
    """Rows that do not divide, every kind of dropout, clipping, articles that end on the way."""
    two = by_two(kind)
    assert_same(two / f"{kind} at the end", one / f"{kind} at the end", **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_to_the_same_bits(by_two, kind):
    two = by_two(kind)
    found = two / f"{kind} in the middle, then at the end"
    assert_same(found, two / f"{kind} at the end")


@pytest.mark.parametrize("kind", KINDS)
def test_two_go_on_with_what_one_has_saved(one, by_two, kind):
    found = by_two(kind) / f"{kind} in the middle, by one, then at the end"
    assert_same(found, one / f"{kind} at the end", **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_one_goes_on_with_what_two_have_saved(one, by_two, tmp_path, kind):
    training = apart.resume(by_two(kind) / f"{kind} in the middle", kind, 1)
    apart.keep(tmp_path / "end", training, apart.go(training, kind, range(MIDDLE, STEPS)))
    assert_same(tmp_path / "end", one / f"{kind} at the end", **CLOSE)


@pytest.mark.parametrize("kind", apart.KINDS)
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_rows_in_parts_change_nothing(one, tmp_path, kind, parts):
    training = apart.build(kind, parts)
    apart.keep(tmp_path / "end", training, apart.go(training, kind, range(STEPS)))
    assert_same(tmp_path / "end", one / f"{kind} at the end", **CLOSE)


def test_something_happens_in_these_trainings(one):
    """Weights move, articles end inside and outside of an unroll, gradients are clipped."""
    for kind in apart.KINDS:
        start, _ = apart.build(kind, 1).state_dict()
        end, meta = checkpoint.load(one / f"{kind} at the end")
        moved = [name for name in end if name in start and not torch.equal(start[name], end[name])]
        learned = "model.layers.0.input_weight" if "rule" not in kind else "rule.rates.log_rate"
        assert any(name.startswith((learned, "rule.log_rate")) for name in moved), kind
        if kind in PUBLISHED:
            assert any(step["gradient_norm"] > apart.AWD.clip for step in meta["values"])
            assert sum("validation_loss" in step for step in meta["values"]) >= 1
            continue
        assert meta["state"]["tree"]["passes"]["entered"] > apart.ROWS
        if kind == "base":
            assert any(step["gradient_norm"] > apart.BASE.clip for step in meta["values"])
        if "base" not in kind:
            lost = [(step["fallbacks"], step["skipped"]) for step in meta["values"]]
            assert lost.count((0, 0)) == STEPS - ("blows up" in kind)
            assert lost.count((1, 1)) == ("blows up" in kind)


@pytest.mark.parametrize(("rows", "count"), [(5, 2), (7, 3), (4, 4), (6, 1)])
def test_parts_hold_every_row_once(rows, count):
    parts = RowShare(0, rows, rows).parts(count)
    held = [row for part in parts for row in range(part.start, part.stop)]
    assert held == list(range(rows))
    assert max(part.size for part in parts) - min(part.size for part in parts) <= 1
    places = [part.start + place for part in parts for place in part.places([0, 2, rows - 1])]
    assert places == [0, 2, rows - 1]


def test_every_part_draws_the_same_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in in_turn(RowShare(0, 4, 4).parts(3)):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_more_processes_than_rows_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 6)
    message = "too few rows for 6 processes; expected at least as many, found 5; use fewer"
    with pytest.raises(ValueError, match=message):
        own_share(5)


@pytest.mark.parametrize("parts", [0, 6])
def test_parts_without_rows_are_refused(parts):
    with pytest.raises(ValueError, match=rf"5 rows cannot be read in {parts} parts; expected 1 to"):
        own_parts(5, parts)


def recalled(folder, mode):
    """What was kept of the reading with every method."""
    lengths = [len(text) for text in apart.texts_of(mode)]
    store = ReadingStore(folder / mode)
    found = [store.get({"method": place}, lengths) for place in range(len(apart.METHODS))]
    assert None not in found
    return found


@pytest.mark.parametrize("mode", apart.MODES)
def test_two_processes_read_what_one_does(by_two, tmp_path, mode):
    """Texts of different lengths, shared out; of a single text, the methods."""
    apart.read(tmp_path, mode)
    for method, found, expected in zip(
        apart.METHODS,
        recalled(by_two("base"), mode),
        recalled(tmp_path, mode),
        strict=True,
    ):
        assert found.fallbacks == expected.fallbacks
        assert (sum(found.fallbacks) > 0) == (method.name == "gone astray")
        for kind in ("nats", "cache", "confidence"):
            pairs = zip(getattr(found, kind), getattr(expected, kind), strict=True)
            for values, others in pairs:
                close = 1e-5 if kind == "confidence" else 1e-10
                np.testing.assert_allclose(values, others, rtol=close, atol=1e-12)
        assert [curve.names for curve in found.curves] == [c.names for c in expected.curves]
        assert bool(found.curves) == (method.learning != "none")
        for curve, other in zip(found.curves, expected.curves, strict=True):
            for text in range(len(found.nats)):
                np.testing.assert_array_equal(curve.places[text], other.places[text])
                np.testing.assert_allclose(curve.values[text], other.values[text], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_texts_are_dealt_once_and_evenly(count):
    lengths = np.random.default_rng(count).integers(1, 50, 8).tolist()
    dealt = deal(lengths, count)
    assert sorted(place for places in dealt for place in places) == list(range(8))
    assert all(places == sorted(places) for places in dealt)
    loads = [sum(lengths[place] for place in places) for places in dealt]
    assert max(loads) - min(loads) <= max(lengths)
    if count == 1:
        assert dealt == [list(range(8))]


def test_readings_come_back_in_the_order_of_the_texts():
    """Of five texts, in three processes of which one has none."""
    dealt = [[1, 4], [], [0, 2, 3]]
    nats = [np.full(number + 1, float(number)) for number in range(5)]
    parts = [
        Readings(
            [nats[place] for place in places],
            [nats[place][None] + 10 for place in places],
            [nats[place][None] + 20 for place in places],
            fallbacks=list(places),
            seconds=len(places),
            curves=[
                Curves(
                    "distance", ("a",), [nats[p] + 30 for p in places], [nats[p] for p in places]
                )
            ]
            if places
            else [],
        )
        for places in dealt
    ]
    found = gathered(parts, dealt)
    assert found.fallbacks == list(range(5))
    assert found.seconds == 3
    (curve,) = found.curves
    columns = (found.nats, found.cache, found.confidence, curve.places, curve.values)
    for number, values in enumerate(zip(*columns, strict=True)):
        for plus, value in zip((0, 10, 20, 30, 0), values, strict=True):
            assert value.ravel().tolist() == [number + plus] * (number + 1)
