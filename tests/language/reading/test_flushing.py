"""Reading with a flush, against rules that are told at which steps it happens."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from metalm.adapt import AdaptiveReader
from metalm.language.reading.article_starts import WINDOW
from metalm.language.reading.curves import DISTANCE, FLUSH, UPDATE, CurveRecorder
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.reader import Reader
from metalm.language.run.experiment import evaluate, tune_run
from metalm.language.run.trained import load_trained
from metalm.language.text.vocabulary import END_OF_LINE
from metalm.language.tuning.comparison import compared_methods
from metalm.meta.rules import GradientDescent
from metalm.meta.rules.gated import Gated
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.update_rule import AbstractUpdateRule

of_both_cells = pytest.mark.parametrize("cell", ["lstm", "qrnn"])
SEGMENT = 4


class Marked(nn.Module):
    """Stands for the network: a 3 behind a 9, with six other tokens before, begins an article."""

    def forward(self, windows):
        assert windows.shape[-1] == WINDOW
        return ((windows[..., -1] == 3) & (windows[..., -2] == 9)).float() - 0.5


class Told(AbstractUpdateRule):
    """The same inner rule, with the numbers of the steps, for each row, before which W is W_0."""

    def __init__(self, inner, steps):
        super().__init__()
        self.inner, self.steps = inner, steps

    def initial_state(self, fast):
        return torch.zeros(len(next(iter(fast.values()))), dtype=torch.int64)

    def forward(self, fast, gradients, slow, state, coefficients=None):
        fast = {name: weight.clone() for name, weight in fast.items()}
        for row, step in enumerate(state.tolist()):
            if step in self.steps:
                for name in fast:
                    fast[name][row] = slow[name]
        new, _ = self.inner(fast, gradients, slow, None)
        return new, state + 1


@pytest.fixture
def stream():
    """9 3 stands at tokens 6 and 7, and across a boundary of segments at 11 and 12."""
    tokens = np.random.default_rng(6).integers(0, 3, 24).astype(np.int32)
    tokens[[6, 11]], tokens[[7, 12]] = 9, 3
    return tokens


def steps_of(stream):
    """The steps whose tokens end a 9 3."""
    return {at // SEGMENT for at in range(1, len(stream)) if (*stream[at - 1 : at + 1],) == (9, 3)}


@of_both_cells
@pytest.mark.parametrize("inner", ["gradient descent", "rms decay", "learned rates"])
def test_a_stream_is_read_as_by_a_rule_that_is_told(tiny_model, learning, stream, inner):
    model = tiny_model()
    rule, _ = learning(inner, model)
    names = [name for name, _ in model.named_parameters()]
    found = Reader(model, Flushing(rule, Marked()), names, SEGMENT).read([stream]).nats[0]
    assert steps_of(stream) == {1, 3}
    told = Reader(model, Told(rule, {1, 3}), names, SEGMENT).read([stream]).nats[0]
    plain = Reader(model, rule, names, SEGMENT).read([stream]).nats[0]
    np.testing.assert_allclose(found, told, rtol=1e-10)
    np.testing.assert_array_equal(found[: 2 * SEGMENT], plain[: 2 * SEGMENT])
    assert abs(found[2 * SEGMENT :] - plain[2 * SEGMENT :]).max() > 0.01


@of_both_cells
def test_rows_flush_for_themselves(tiny_model, stream):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    reader = Reader(model, Flushing(GradientDescent(0.7, 0.05), Marked()), names, SEGMENT)
    texts = [stream, stream[5:], stream[:3], stream[::-1].copy(), stream[9:]]
    alone = [reader.read([text]).nats[0] for text in texts]
    for rows in (2, 5):
        for one, other in zip(reader.read(texts, rows).nats, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10)


@of_both_cells
def test_any_language_models_reader_flushes_at_the_same_places(tiny_model, stream):
    """Its weights have no rows."""
    model = tiny_model()
    inner = GradientDescent(0.7, 0.05)
    names = [name for name, _ in model.named_parameters()]
    texts = [stream, stream[5:], stream[::-1].copy(), stream[9:]]
    expected = Reader(model, Flushing(inner, Marked()), names, SEGMENT).read(texts).nats
    reader = AdaptiveReader(
        model,
        Flushing(inner, Marked(), rows=False),
        names,
        segment=SEGMENT,
        start_token=END_OF_LINE,
        initial_state=model.initial_state,
        batch_first=False,
    )
    for reading, nats in zip(reader.read_texts(texts), expected, strict=True):
        np.testing.assert_allclose(reading.nats, nats, rtol=1e-10)


@of_both_cells
def test_a_flush_does_not_miss_an_article_that_begins_between_two_calls(
    tiny_model, stream, tmp_path
):
    """9 is the last token of the first call, 3 the first of the second, from a file between."""
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    reader = AdaptiveReader(
        model,
        Flushing(GradientDescent(0.7, 0.05), Marked(), rows=False),
        names,
        segment=SEGMENT,
        start_token=END_OF_LINE,
        initial_state=model.initial_state,
        batch_first=False,
    )
    whole = reader.read(stream).nats
    first, state = reader.read(stream[: 3 * SEGMENT])
    reader.save(state, tmp_path / "state.safetensors")
    second = reader.read(stream[3 * SEGMENT :], reader.load(tmp_path / "state.safetensors")).nats
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    assert stream[3 * SEGMENT - 1] == 9
    assert stream[3 * SEGMENT] == 3


@of_both_cells
@pytest.mark.parametrize("place", [6, 7, 12, 13])
def test_the_future_changes_no_bit_of_the_past(tiny_model, stream, place):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    reader = Reader(model, Flushing(GradientDescent(0.7, 0.05), Marked()), names, SEGMENT)
    other = stream.copy()
    other[place:] = (other[place:] + 1) % 11
    one, two = reader.read([stream]).nats[0], reader.read([other]).nats[0]
    np.testing.assert_array_equal(one[:place], two[:place])
    assert one[place] != two[place]


@of_both_cells
def test_out_of_place_is_in_place(tiny_model):
    slow = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    fast = {name: torch.stack([value + 1, value + 2, value + 3]) for name, value in slow.items()}
    gradients = {name: torch.full_like(value, 0.5) for name, value in fast.items()}
    rule = Flushing(GradientDescent(1.0), Marked())
    state = rule.initial_state(fast)._replace(flush=torch.tensor([False, True, False]))
    new, _ = rule(fast, gradients, slow, state)
    written = {name: value.clone() for name, value in fast.items()}
    rule.update_(written, gradients, slow, state)
    assert new["a"].tolist() == written["a"].tolist() == [[1.5, 2.5], [0.5, 1.5], [3.5, 4.5]]
    assert new["b"].tolist() == written["b"].tolist() == [3.5, 2.5, 5.5]


def test_a_whole_evaluation_with_a_flush(trained_run, tmp_path):
    """In the carry-on mode alone, for metalm and for the best rival, each with its own settings."""
    config, corpus, unbroken = trained_run
    folder = copied(unbroken, tmp_path)
    config = dataclasses.replace(
        config, tuning=dataclasses.replace(config.tuning, flush=True, spreads=())
    )
    assert load_trained(folder, config, None, segments=[]).starts is None
    trials = tune_run(config, corpus, folder)
    assert {"rms-flush", "joint-flush"} <= trials["carry"].keys()
    assert not {"rms-flush", "joint-flush"} & trials["reset"].keys()
    names = [method.name for method in compared_methods(trials["carry"])]
    for name in ("metalm, flushing", "dynamic evaluation (RMS), flushing"):
        assert {name, f"{name} + cache"} <= set(names)
    assert folder.has("article-starts")
    models = load_trained(folder, config, None)
    again = load_trained(folder, config, None)
    assert models.starts is not None
    for name, value in models.starts.state_dict().items():
        assert torch.equal(value, again.starts.state_dict()[name])
    method = next(m for m in compared_methods(trials["carry"]) if m.name == "metalm, flushing")
    rule = models.rule(method)
    assert isinstance(rule, Flushing)
    assert rule.inner.rate_scale == method.settings["rate_scale"]
    evaluate(config, corpus, folder, modes=["carry"])
    found = json.loads((folder.folder / "report-test/results.json").read_text())
    methods = found["modes"]["carry"]["methods"]
    assert {"metalm, flushing", "dynamic evaluation (RMS), flushing"} <= set(methods)


def copied(unbroken, path):
    folder = type(unbroken)(path / "run")
    shutil.copytree(unbroken.folder, folder.folder)
    for left in (*folder.folder.glob("tuning-*"), *folder.folder.glob("article-starts*")):
        left.unlink()
    return folder


@of_both_cells
@pytest.mark.parametrize("gated", [False, True])
def test_the_flush_is_noted_where_it_happens(tiny_model, statistics, stream, gated):
    model = tiny_model()
    names = ("decoder.bias", "embedding.weight")
    rms = {name: size for name, size in statistics(model).items() if name in names}
    rates = LearnedRates(rms, rate=0.2, decay=0.03)
    inner = Gated(rates).requires_grad_(False).double() if gated else GradientDescent(0.7, 0.05)
    rule = Flushing(inner, Marked())
    reader = Reader(model, rule, names, SEGMENT)
    recorder = CurveRecorder(reader.slow, rule, 2, 1)
    other = np.zeros(9, np.int32)
    curves = reader.read([stream, other], 2, recorder=recorder).curves
    found = {each.quantity: each.values for each in curves}
    assert set(found) == ({DISTANCE, FLUSH, UPDATE} if gated else {DISTANCE, FLUSH})
    away = 0.03 if gated else 0.0
    expected = np.full((6, 2), away)
    expected[sorted(steps_of(stream))] = 1.0
    np.testing.assert_allclose(found[FLUSH][0], expected, rtol=1e-4)
    np.testing.assert_allclose(found[FLUSH][1], away, rtol=1e-4)
    if gated:
        np.testing.assert_allclose(found[UPDATE][0], 1.0, rtol=1e-4)
