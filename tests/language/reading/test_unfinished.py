"""Readings that are stopped after a segment and go on: the same bits as without a stop."""

import numpy as np
import pytest
import torch
from torch import nn

from metalm.language.reading.curves import CurveRecorder
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.methods import Method
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.reading.unfinished import Unfinished
from metalm.language.run.scoring import score_split
from metalm.meta.rules import GradientDescent
from metalm.meta.rules.kinds import learned_rule
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.training import precision, processes

of_both_cells = pytest.mark.parametrize("cell", ["lstm", "qrnn"])
NAMES = ("embedding.weight", "layers.1.input_weight", "decoder.bias")
SEGMENT = 3
GRID = CacheGrid(thetas=(0.5, 2.0), window=6)
KINDS = ("static", "gradient descent", "flushing", "rates", "gated", "lstm", "momentum")
LOW = ", in bfloat16"


class StoppedError(Exception):
    """Stands for whatever ends a program."""


class Begins(nn.Module):
    """Stands for the network that tells where articles begin: at every 3."""

    def forward(self, windows):
        return (windows[..., -1] == 3).float() - 0.5


def rule_of(kind, model, statistics):
    if kind == "static":
        return None
    if kind == "gradient descent":
        return GradientDescent(0.7, 0.05)
    if kind == "flushing":
        return Flushing(GradientDescent(0.7, 0.05), Begins())
    rms = {name: size for name, size in statistics(model).items() if name in NAMES}
    rule = learned_rule(kind, LearnedRates(rms, rate=0.2, decay=0.03))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return rule.requires_grad_(False)


def stops_after(segments):
    """A progress that ends the program while the next segment is read."""
    left = [segments]

    def told(tokens, nats):
        del tokens, nats
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    return told


def assert_same(found, expected):
    for name in ("nats", "cache", "confidence", "tempered"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    assert found.fallbacks == expected.fallbacks
    for one, other in zip(found.curves, expected.curves, strict=True):
        assert (one.quantity, one.names) == (other.quantity, other.names)
        for part in ("places", "values"):
            for of_text, wanted in zip(getattr(one, part), getattr(other, part), strict=True):
                np.testing.assert_array_equal(of_text, wanted)


@of_both_cells
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "static" + LOW, "momentum" + LOW])
def test_a_reading_goes_on_where_it_was_stopped(
    tiny_model, texts, statistics, tmp_path, monkeypatch, kind, rows
):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)
    low = kind.endswith(LOW)
    model = tiny_model(dtype=torch.float32 if low else torch.float64)

    def read(progress, unfinished):
        rule = rule_of(kind.removesuffix(LOW), model, statistics)
        options = {"confidence": True, "temperatures": (0.9, 1.1), "surprise": 0.3}
        options["bfloat16"] = low
        reader = Reader(model, rule, NAMES, SEGMENT, GRID, **options)
        recorder = None if rule is None else CurveRecorder(reader.slow, rule, len(texts), 2)
        return reader.read(texts, rows, progress, recorder, unfinished)

    told = []
    whole = read(lambda *of_segment: told.append(of_segment), None)
    for stop in (1, 4, len(told) - 1):
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(StoppedError):
            read(stops_after(stop), Unfinished(path, {"a": 1}, every=0.0))
        after = []
        found = read(lambda *of_segment, a=after: a.append(of_segment), Unfinished(path, {"a": 1}))
        assert_same(found, whole)
        assert after[0][0] == sum(tokens for tokens, _ in told[:stop])  # at once what was there
        assert after[0][1] == pytest.approx(sum(nats for _, nats in told[:stop]))
        assert after[1:] == told[stop:]
        assert found.seconds > 0.0


@of_both_cells
def test_rows_that_fell_back_stay_counted(tiny_model, texts, tmp_path):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]

    def read(progress=None, unfinished=None):
        reader = Reader(model, GradientDescent(1e4), names, SEGMENT)
        return reader.read(texts, 2, progress, None, unfinished)

    whole = read()
    assert sum(whole.fallbacks) > 1
    for stop in (2, 3, 4):
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(StoppedError):
            read(stops_after(stop), Unfinished(path, {}, every=0.0))
        assert_same(read(None, Unfinished(path, {})), whole)


@of_both_cells
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_another_number_of_rows_goes_on_as_it_began(tiny_model, texts, tmp_path, before, after):
    model = tiny_model()
    reader = Reader(model, GradientDescent(0.7, 0.05), NAMES, SEGMENT, GRID)
    whole = reader.read(texts, before)
    for stop in (1, 2, 3):
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(StoppedError):
            reader.read(texts, before, stops_after(stop), None, Unfinished(path, {}, every=0.0))
        assert_same(reader.read(texts, after, None, None, Unfinished(path, {})), whole)


@of_both_cells
def test_what_was_kept_of_another_reading_is_left_and_damage_is_named(tiny_model, texts, tmp_path):
    model, path = tiny_model(), tmp_path / "kept.safetensors"
    reader = Reader(model, GradientDescent(0.7), NAMES, SEGMENT)
    with pytest.raises(StoppedError):
        reader.read(texts, 1, stops_after(2), None, Unfinished(path, {"rate": 1}, every=0.0))
    assert Unfinished(path, {"rate": 1}).found() is not None
    assert Unfinished(path, {"rate": 2}).found() is None
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"kept.safetensors was altered; .*; delete it"):
        reader.read(texts, 1, None, None, Unfinished(path, {"rate": 1}))


@of_both_cells
def test_each_of_several_processes_has_its_own_file(tiny_model, texts, tmp_path, monkeypatch):
    """It goes on as the same one of as many, and as no other."""
    reader = Reader(tiny_model(), GradientDescent(0.7, 0.05), NAMES, SEGMENT, GRID)
    path, parts = tmp_path / "kept.safetensors", (texts[:1], texts[1:])

    def be(rank, count):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda: count)
        return Unfinished(path, {}, every=0.0)

    whole, told = [], []
    for part in parts:
        tokens = []
        whole.append(reader.read(part, 1, lambda count, _, t=tokens: t.append(count)))
        told.append(tokens[0])
    for rank, part in enumerate(parts):
        with pytest.raises(StoppedError):
            reader.read(part, 1, stops_after(1), None, be(rank, 2))
    assert len(list(tmp_path.iterdir())) == 2
    assert be(0, 1).found() is None
    assert be(0, 3).found() is None
    for rank, part in enumerate(parts):
        after, kept = [], be(rank, 2)
        found = reader.read(part, 1, lambda tokens, _, a=after: a.append(tokens), None, kept)
        assert_same(found, whole[rank])
        assert after[0] == told[rank]  # at once what was there
        kept.forget()
    assert not list(tmp_path.iterdir())


@of_both_cells
def test_nothing_is_written_before_it_is_time(tiny_model, texts, tmp_path):
    path = tmp_path / "kept.safetensors"
    reader = Reader(tiny_model(), GradientDescent(0.7), NAMES, SEGMENT)
    reader.read(texts, 1, None, None, Unfinished(path, {}, every=3600.0))
    assert not path.exists()


@of_both_cells
@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_a_stopped_evaluation_goes_on_within_a_reading(
    models, articles, tmp_path, monkeypatch, mode
):
    """Of methods that read one text side by side, too; nothing unfinished is left behind."""
    monkeypatch.setattr(Unfinished.__init__, "__defaults__", (0.0,))
    settings = {"rate": 0.2, "decay": 0.01, "eps": 0.7}
    methods = [
        Method(name="static", model="control", learning="none", segment=64),
        Method(name="rms", model="control", learning="rms", segment=4, settings=settings),
        Method(
            name="rms, slower",
            model="control",
            learning="rms",
            segment=4,
            settings=settings | {"rate": 0.1},
        ),
    ]

    def scored(folder, progress=None):
        return score_split(models, methods, articles, mode, ReadingStore(folder), 2, progress)

    whole = scored(tmp_path / "whole")
    calls = []

    def begin(name, tokens):
        calls.append(name)
        return stops_after(2 if name.startswith("rms") else 100)

    folder = tmp_path / "stopped"
    for _ in range(20):
        try:
            found = scored(folder, begin)
            break
        except StoppedError:
            assert len(list(folder.glob("unfinished-*"))) == 1
            # What a kill leaves while a reading is kept; safetensors has names of its own.
            for name in (".unfinished-0.safetensors.77.partial", ".tmpAb3dE9"):
                (folder / name).touch()
    assert len(calls) > 3
    assert all(path.name[0] != "." for path in folder.iterdir())
    assert not list(folder.glob("unfinished-*"))
    for name in ("static", "rms", "rms, slower"):
        np.testing.assert_array_equal(found.scores.nats(name), whole.scores.nats(name))
