"""The same numbers on a CUDA device as on the processor, whose float64 path is the oracle."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from metalm.language.reading import captured_step
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.training import meta_training
from metalm.language.training.awd_training import AwdTraining, AwdTrainingConfig
from metalm.language.training.base_training import BaseTraining, BaseTrainingConfig
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import (
    JointTrainingConfig,
    RuleTrainingConfig,
    starting_rule,
)
from metalm.meta.parameters import choose
from metalm.training.state import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize(
        ("cell", "cutoffs"), [("lstm", ()), ("qrnn", ()), ("lstm", (4, 7))], ids=str
    ),
]

DEVICE = "cuda"
PATTERNS = ("embedding.*", "decoder.*", "*input_weight", "*_bias")
SIZES = {"rows": 3, "segment": 4, "unroll": 3, "tokens": 100, "bfloat16": False}


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in (17, 20, 5, 14)])


def rule_for(model, config):
    names = choose(model, PATTERNS)
    weights = dict(model.named_parameters())
    torch.manual_seed(2)
    rms = {name: torch.rand(weights[name].shape, dtype=torch.float64) + 0.1 for name in names}
    rule = starting_rule(rms, config)
    with torch.no_grad():
        rule.rate_scale.fill_(30.0)
    return rule


def same(found, expected):
    """Trees as `pack` makes them, on any device."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].cpu(), tensor.cpu(), rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["rates", "gated", "momentum", "lstm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"order": 2},
        {"order": 2, "checkpoint_every": 2},
        {"surprise": 0.5},
        {"carry_rows": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("joint", [False, True])
def test_steps_of_a_rules_training(tiny_model, articles, kind, changes, joint):
    form = RuleTrainingConfig(kind=kind, learning_rate=0.03, **SIZES)
    config = (
        JointTrainingConfig(learning_rate=0.03, dropout=False, **SIZES | changes)
        if joint
        else dataclasses.replace(form, **changes)
    )
    model = tiny_model()
    rule, ends = rule_for(model, form), []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        training = MetaTraining(
            own,
            copy.deepcopy(rule).to(device),
            rule.names,
            articles,
            config,
            lambda index: 1.0,
            5,
            torch.optim.AdamW(own.parameters(), lr=1.0) if joint else None,
            (lambda index: 0.01) if joint else None,
        )
        values = [training.step(index) for index in range(4)]
        ends.append((values, training.state_dict()[0]))
    (expected, kept), (found, there) = ends
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    same(there, kept)


@pytest.mark.parametrize("joint", [False, True])
def test_captured_steps_in_forward_mode(tiny_model, articles, joint):
    """Seven, of which those after the second are one graph a shape."""
    common = {"learning_rate": 0.03, "mode": "forward", **SIZES}
    form = RuleTrainingConfig(**common)
    config = JointTrainingConfig(dropout=False, **common) if joint else form
    model = tiny_model()
    rule, ends = rule_for(model, form), []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        optimizer = torch.optim.AdamW(own.parameters(), lr=1.0) if joint else None
        rates = (lambda index: 0.01) if joint else None
        training = MetaTraining(
            own, copy.deepcopy(rule).to(device), rule.names, articles, config,
            lambda index: 1.0, 5, optimizer, rates,
        )  # fmt: skip
        values = [training.step(index) for index in range(7)]
        ends.append((values, training.state_dict()[0]))
    assert model.config.cutoffs or training._captured._graphs
    (expected, kept), (found, there) = ends
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    same(there, kept)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_captured_step_draws_and_rounds_as_a_plain_one(
    tiny_model, articles, monkeypatch, bfloat16
):
    """On the GPU alone, with dropout, from one seed, in float32."""
    common = {"learning_rate": 0.03, "mode": "forward", **SIZES, "bfloat16": bfloat16}
    model = tiny_model(output_dropout=0.3, weight_dropout=0.2).float()
    rule, ends = rule_for(model, RuleTrainingConfig(**common)).float(), []
    for patience in (10**9, 2):
        monkeypatch.setattr(meta_training, "PATIENCE", patience)
        torch.manual_seed(7)
        own = copy.deepcopy(model).to(DEVICE)
        training = MetaTraining(
            own, copy.deepcopy(rule).to(DEVICE), rule.names, articles,
            JointTrainingConfig(**common), lambda index: 1.0, 5,
            torch.optim.AdamW(own.parameters(), lr=1.0), lambda index: 0.01,
        )  # fmt: skip
        ends.append([training.step(index)["loss"] for index in range(7)])
        assert model.config.cutoffs or not training._captured._failed
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


def test_a_training_that_changes_devices(tiny_model, articles):
    """Saved on one, resumed on the other, and the whole on the processor."""
    config = JointTrainingConfig(learning_rate=0.03, dropout=False, **SIZES)
    model = tiny_model()
    rule = rule_for(model, RuleTrainingConfig(**SIZES))

    def build(device):
        own = copy.deepcopy(model).to(device)
        optimizer = torch.optim.AdamW(own.parameters(), lr=1.0)
        common = articles, config, lambda index: 1.0, 5, optimizer, lambda index: 0.01
        return MetaTraining(own, copy.deepcopy(rule).to(device), rule.names, *common)

    whole, there, back = build("cpu"), build(DEVICE), build("cpu")
    for index in range(4):
        whole.step(index)
    for index in range(2):
        there.step(index)
    tensors, meta = there.state_dict()
    back.load_state_dict({name: tensor.cpu() for name, tensor in tensors.items()}, meta)
    for index in range(2, 4):
        back.step(index)
    same(back.state_dict()[0], whole.state_dict()[0])


def test_steps_of_ordinary_training(tiny_model, articles):
    config = BaseTrainingConfig(tokens=100, rows=3, window=5, learning_rate=0.01, bfloat16=False)
    model, ends = tiny_model(), []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        training = BaseTraining(own, articles, config, lambda index: 0.01, 5)
        values = [training.step(index) for index in range(4)]
        ends.append((values, pack(own.state_dict())[0]))
    for one, other in zip(ends[1][0], ends[0][0], strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    same(ends[1][1], ends[0][1])


@pytest.mark.parametrize("patience", [2, 1000])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["static", "rms decay", "learned rates"])
def test_reading(tiny_model, texts, learning, monkeypatch, kind, rows, patience):
    """By CUDA graphs from the third step of a batch on, and without."""
    monkeypatch.setattr(captured_step, "PATIENCE", patience)
    model = tiny_model()
    rule, _ = learning(kind, model)
    names = [name for name, _ in model.named_parameters()]
    grid = CacheGrid(thetas=(0.3, 1.0), window=6)
    found = []
    for device in ("cpu", DEVICE):
        own = None if rule is None else copy.deepcopy(rule).to(device)
        reader = Reader(copy.deepcopy(model).to(device), own, names, 4, grid)
        found.append(reader.read(texts, rows))
    for one, other in zip(found[1].nats, found[0].nats, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)
    for one, other in zip(found[1].cache, found[0].cache, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7)


def test_steps_of_a_published_training(tiny_model, articles):
    """Windows of several lengths, captured once and replayed (`metalm/training/captured.py`)."""
    config = AwdTrainingConfig(
        recipe="one-cycle", epochs=3, rows=3, window=4, short_windows=0.3, window_spread=1.0,
        shortest_window=2, learning_rate=0.03, validation_rows=2, bfloat16="off",
    )  # fmt: skip
    model, ends = tiny_model(), []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        training = AwdTraining(own, articles, articles, config, seed=1)
        losses = [training.step(index)["loss"] for index in range(training.num_steps)]
        ends.append((losses, training.state_dict()[0]))
    assert len(ends[0][0]) > 6
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-7)
    same(ends[1][1], ends[0][1])
