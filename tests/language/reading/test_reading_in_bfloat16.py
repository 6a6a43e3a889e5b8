"""Reading with products in bfloat16: near float32, and nothing but the products is in bfloat16."""

import copy

import numpy as np
import pytest
import torch

from metalm.language.network.segment_loss import SegmentLoss
from metalm.language.reading.cache import CacheConfig, CacheMemory
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.run.scoring import score_split
from metalm.language.training.meta_training_config import RuleTrainingConfig, starting_rule
from metalm.meta.rules import GradientDescent
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.tree import tensors
from metalm.training import precision

of_all_models = pytest.mark.parametrize(
    ("cell", "cutoffs"), [("lstm", ()), ("qrnn", ()), ("lstm", (4, 7))], ids=str
)
KINDS = ("static", "gradient descent", "rms decay", "learned rates")
NETWORKS = ("gated", "lstm", "momentum")
SEGMENT = 4
# Nats a token: of one, and on average. Logits of about 1 are rounded by 2^-9 of themselves, and so
# is what they are made from; 36 tokens average little.
# `reading/reader.py` states it for whole articles.
ONE, MEAN = 0.1, 0.005


@pytest.fixture(autouse=True)
def _has_bfloat16(monkeypatch):
    """A processor without it emulates it, slowly."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)


@pytest.fixture
def model(tiny_model):
    return tiny_model(dtype=torch.float32)


class Begins(torch.nn.Module):
    """Stands for the network: an article begins behind every 7; says in what it was asked."""

    def forward(self, windows):
        assert not torch.is_autocast_enabled("cpu")
        return (windows[..., -1] == 7).float() - 0.5


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def both(model, rule, texts, rows=1, **options):
    names = names_of(model) if getattr(rule, "names", None) is None else rule.names
    return (
        Reader(model, rule, names, SEGMENT, bfloat16=low, **options).read(texts, rows)
        for low in (False, True)
    )


def assert_near(exact, found):
    """Within the tolerance, and not the same bits."""
    exact, found = np.concatenate(exact), np.concatenate(found)
    assert np.abs(found - exact).max() < ONE
    assert abs(found.mean() - exact.mean()) < MEAN
    assert (found != exact).mean() > 0.9


@of_all_models
@pytest.mark.parametrize("surprise", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_near_a_hand_written_loop_in_float64(
    model, texts, learning, plain_read, kind, rows, surprise
):
    rule, update = learning(kind, model)
    exact, found = both(model, rule, texts, rows, surprise=surprise)
    assert sum(found.fallbacks) == 0
    twice = copy.deepcopy(model).double()
    expected = [plain_read(twice, text, SEGMENT, update, surprise=surprise)[0] for text in texts]
    assert_near(expected, found.nats)
    assert_near(exact.nats, found.nats)
    np.testing.assert_allclose(np.concatenate(exact.nats), np.concatenate(expected), rtol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
@pytest.mark.parametrize("kind", [*KINDS[1:], *NETWORKS, "flushing"])
def test_a_stream_is_near_float32_under_every_rule(model, texts, learning, statistics, kind):
    if kind in NETWORKS:
        rule = starting_rule(statistics(model), RuleTrainingConfig(kind=kind))
        rule.rate_scale.fill_(300.0)
    elif kind == "flushing":
        rule = Flushing(GradientDescent(0.7, 0.05), Begins())
    else:
        rule, _ = learning(kind, model)
    stream = [np.concatenate([*texts, *texts[::-1]])]
    assert 7 in stream[0]
    exact, found = both(model, rule, stream, cache=CacheGrid(thetas=(0.3, 1.0), window=9))
    assert_near(exact.nats, found.nats)
    with np.errstate(over="ignore"):
        likely = [np.exp(reading.cache[0]) for reading in (exact, found)]
    np.testing.assert_allclose(*likely, atol=0.05)
    static = Reader(model, segment=SEGMENT, bfloat16=True).read(stream).nats[0]
    assert abs(found.nats[0] - static).max() > 0.05  # it does learn


class Notes:
    """Looks at the memory after every update, as a recorder of curves may."""

    def __init__(self):
        self.fast, self.types = {}, set()

    def note(self, positions, fast, rule_state):
        del positions
        self.fast = {name: weight.clone() for name, weight in fast.items()}
        self.types |= {tensor.dtype for tensor in tensors((fast, rule_state))}

    def curves(self):
        return []


@of_all_models
@pytest.mark.parametrize("kind", ["gradient descent", "lstm", "momentum"])
def test_fast_weights_and_the_rules_state_stay_in_float32(model, texts, learning, statistics, kind):
    rule, _ = learning(kind, model)
    if kind in NETWORKS:
        rule = starting_rule(statistics(model), RuleTrainingConfig(kind=kind))
    notes = Notes()
    Reader(model, rule, names_of(model), SEGMENT, bfloat16=True).read(texts, 2, recorder=notes)
    assert notes.types == {torch.float32}


@of_all_models
def test_steps_that_bfloat16_cannot_hold_add_up(model, texts):
    """Each is far below half the spacing of bfloat16 around most weights, and none is lost."""
    notes, exact = Notes(), Notes()
    for low, seen in ((True, notes), (False, exact)):
        reader = Reader(model, GradientDescent(1e-4), names_of(model), SEGMENT, bfloat16=low)
        reader.read([np.concatenate(texts)], recorder=seen)
    for name, weight in model.named_parameters():
        moved, expected = notes.fast[name][0] - weight, exact.fast[name][0] - weight
        assert (moved.abs() <= 1e-2 * weight.abs().max()).all()
        error = (moved - expected).norm() / expected.norm()
        assert error < 0.05, name


@of_all_models
def test_what_a_segment_leaves_is_in_float32(model, learning):
    """Scores under temperatures and confidence are worked out of the logits in float32."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 11, (2, 5, 3), generator=generator)
    temperatures = (0.5, 2.0)
    loss = SegmentLoss(model, 5, confidence=True, temperatures=temperatures)
    weights = dict(model.named_parameters())
    batch = type("Batch", (), {"inputs": tokens[0], "targets": tokens[1], "mask": torch.ones(5, 3)})
    state = model.initial_state(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses, score, after = loss(weights, batch, state)
        logits = model(tokens[0], state).logits.double()
    found = (losses, *after, score.nats, score.features, score.confidence, score.tempered)
    assert {tensor.dtype for tensor in tensors(found)} == {torch.float32}
    logs = logits.log_softmax(-1)
    sure = torch.stack((logs.amax(-1), -(logs * logs.exp()).sum(-1)))
    torch.testing.assert_close(score.confidence.double(), sure, rtol=1e-5, atol=1e-5)
    for nats, temperature in zip(score.tempered, temperatures, strict=True):
        expected = (logits / temperature).log_softmax(-1).gather(2, tokens[1].unsqueeze(2))
        torch.testing.assert_close(nats.double(), -expected.squeeze(2), rtol=1e-5, atol=1e-5)


def test_the_cache_keeps_and_compares_in_float32(model, texts, monkeypatch):
    seen, score = [], CacheMemory.score

    def look(self, features, targets, thetas, **options):
        found = score(self, features, targets, thetas, **options)
        assert not torch.is_autocast_enabled("cpu")
        seen.extend(t.dtype for t in (features, self._keys, thetas, *found))
        return found

    monkeypatch.setattr(CacheMemory, "score", look)
    grid = CacheGrid(thetas=(0.3, 1.0), window=5)
    Reader(model, segment=SEGMENT, cache=grid, bfloat16=True).read(texts, 2)
    assert set(seen) == {torch.float32}


def test_bfloat16_that_would_be_emulated_is_refused(model, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: False)
    message = r"expected a processor or GPU with matrix products in bfloat16, found one .*; leave o"
    with pytest.raises(ValueError, match=message):
        Reader(model, bfloat16=True)


CACHE = CacheConfig(theta=0.5, share=0.1, window=6)
RATE = {"rate": 0.3, "decay": 0.02}
SCALES = {"rate_scale": 1.5, "decay_scale": 2.0}
STATIC = Method(name="static", model="control", learning="none", segment=5)
SGD = Method(name="sgd", model="control", learning="sgd", segment=4, settings=RATE)
RMS = SGD.with_(name="rms", learning="rms", settings={"rate": 0.1, "decay": 0.01, "eps": 0.7})
JOINT = Method(name="metalm", model="joint", learning="joint", segment=3, settings=SCALES)
METHODS = (
    STATIC,
    STATIC.with_(name="cache", cache=CACHE),
    SGD,
    RMS.with_(name="rms + cache", cache=CACHE),
    RMS.with_(name="rms, flushing", learning="rms-flush"),
    JOINT,
    JOINT.with_(name="two rates + cache", cache=CACHE, multiples=(1.0, 0.25)),
    JOINT.with_(name="metalm, flushing", learning="joint-flush"),
)


@pytest.fixture
def models(tiny_model, statistics):
    """In float32, as trained ones are."""
    control, joint = (tiny_model(seed=seed, dtype=torch.float32) for seed in (0, 1))
    rms = statistics(control)
    names = ("embedding.weight", "decoder.bias")
    rule = LearnedRates({name: rms[name] for name in names}, rate=0.2).requires_grad_(False)
    return TrainedModels(
        models={"control": control, "joint": joint},
        rules={"joint": rule},
        rival_names=tuple(rms),
        statistics={4: rms},
        starts=Begins(),
    )


def losses_of(scored):
    return {
        name: [article.losses[name] for article in scored.scores.articles]
        for name in scored.scores.methods
    }


@pytest.mark.parametrize(("mode", "rows"), [("reset", 2), ("carry", 1), ("carry", 3)])
@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_it_reaches_every_method(models, articles, tmp_path, mode, rows):
    exact, found = (
        losses_of(
            score_split(
                models, METHODS, articles, mode, ReadingStore(tmp_path / name), rows, bfloat16=low
            )
        )
        for name, low in (("exact", False), ("low", True))
    )
    for method in METHODS:
        one, other = (np.concatenate(of[method.name]) for of in (exact, found))
        assert (one != other).mean() > 0.9, method.name  # words of up to three tokens
        assert np.abs(one - other).max() < 3 * ONE, method.name
        assert abs(one.sum() - other.sum()) / articles.num_tokens < 3 * MEAN, method.name


def test_a_reading_of_one_precision_never_stands_for_the_other(models, articles, tmp_path):
    told, store = [], ReadingStore(tmp_path)

    def begin(name, total):
        told.append((name, total))
        return lambda tokens, nats: None

    def read(low):
        told.clear()
        methods = METHODS[:3]
        found = score_split(models, methods, articles, "reset", store, 2, begin, bfloat16=low)
        return losses_of(found), len(told)

    exact, first = read(False)
    low, second = read(True)
    assert first == second == 2  # the cache shares the reading of the static model
    again, third = read(False)
    low_again, fourth = read(True)
    assert third == fourth == 0
    for name, of_name in exact.items():
        for pair in zip(of_name, again[name], strict=True):
            np.testing.assert_array_equal(*pair)
        for pair in zip(low[name], low_again[name], strict=True):
            np.testing.assert_array_equal(*pair)
        assert any((a != b).any() for a, b in zip(of_name, low[name], strict=True))
