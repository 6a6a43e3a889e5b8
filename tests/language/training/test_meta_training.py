import copy
import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch

from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import (
    JointTrainingConfig,
    RuleTrainingConfig,
    starting_rule,
)
from metalm.meta.parameters import choose
from metalm.meta.rules.gated import Gated
from metalm.meta.rules.kinds import RuleKind
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.rms_decay import RmsDecay
from metalm.meta.update_rule import AbstractUpdateRule

SEED, ROWS, SEGMENT, UNROLL = 6, 2, 3, 2
SIZES = {"rows": ROWS, "segment": SEGMENT, "unroll": UNROLL, "clip": 0.05}
FROZEN = RuleTrainingConfig(learning_rate=0.03, **SIZES)
JOINT = JointTrainingConfig(learning_rate=0.03, model_clip=0.2, **SIZES)
PATTERNS = {"all": ("*",), "some": ("embedding.*", "layers.1.input_weight", "*_bias")}
LENGTHS = (7, 10, 5, 14)


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in LENGTHS])


def schedule(index):
    return 1.0 / (1 + 0.5 * index)


@pytest.fixture
def meta_training(tiny_model, articles, statistics):
    def build(joint=False, adapt="some", granularity="tensor", seed=0, config=None, **sizes):
        model = tiny_model(seed=seed, **sizes)
        names = choose(model, PATTERNS[adapt])
        rms = {name: statistics(model)[name] for name in names}
        rule = LearnedRates(rms, granularity, rate=0.3, decay=0.02, exponent=0.4, eps=0.8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
        return MetaTraining(
            model,
            rule,
            names,
            articles,
            config or (JOINT if joint else FROZEN),
            schedule,
            SEED,
            optimizer if joint else None,
            (lambda index: 0.02 * schedule(index)) if joint else None,
        )

    return build


class Reference:
    """The same training by plain autograd, row after row, the inner gradients held constant."""

    def __init__(self, training, articles, plain_nats, plain_state, learned_update):
        self.texts = [article.tokens for article in articles]
        self.plain_nats, self.plain_state = plain_nats, plain_state
        self.update = learned_update
        self.model, self.joint = training.model, training.model_optimizer is not None
        self.rule, self.unroll = copy.deepcopy(training.rule), training.config.unroll
        self.surprise = training.config.surprise
        self.carry_rows = training.config.carry_rows
        parameters = dict(training.model.named_parameters())
        self.leaves = {n: w.detach().clone() for n, w in parameters.items()}
        for leaf in self.leaves.values():
            leaf.requires_grad_(self.joint)
        self.names = list(training.slow)
        self.optimizer = torch.optim.Adam(self.rule.parameters(), lr=1.0)
        self.model_optimizer = torch.optim.AdamW(self.leaves.values(), lr=1.0, weight_decay=0.1)
        self.entered, self.rows = 0, [None] * ROWS

    def next_text(self):
        number, place = divmod(self.entered, len(self.texts))
        order = np.random.default_rng([SEED, number]).permutation(len(self.texts))
        self.entered += 1
        return self.texts[order[place]]

    def enter(self, carry):
        return {
            "text": self.next_text(),
            "carry": carry,
            "position": 0,
            "fast": {name: self.leaves[name].detach().clone() for name in self.names},
            "state": self.plain_state(self.model),
        }

    def read_row(self, row):
        """The losses of a row's segments, as a graph over slow weights, rest and rule."""
        fast = {
            name: (value - self.leaves[name]).detach() + self.leaves[name]
            for name, value in row["fast"].items()
        }
        losses, count = [], 0
        for _ in range(self.unroll):
            start, end = row["position"], min(row["position"] + SEGMENT, len(row["text"]))
            row["position"], count = end, count + end - start
            gradients = [torch.zeros_like(fast[name]) for name in self.names]
            if end > start:
                inputs = [0, *row["text"]][start:end]
                copies = {name: value.detach().requires_grad_() for name, value in fast.items()}
                pair = inputs, row["text"][start:end]
                nats, _, _ = self.plain_nats({**self.leaves, **copies}, *pair, row["state"])
                weighed = sum(cost * (cost.item() / 3) ** self.surprise for cost in nats)
                gradients = torch.autograd.grad(weighed / SEGMENT, list(copies.values()))
                nats, _, state = self.plain_nats({**self.leaves, **fast}, *pair, row["state"])
                row["state"] = [(hidden.detach(), cell.detach()) for hidden, cell in state]
                losses.append(nats.sum())
            fast = {
                name: self.update(self.rule, name, fast[name], gradient, self.leaves[name])
                for name, gradient in zip(self.names, gradients, strict=True)
            }
        row["fast"] = {name: value.detach() for name, value in fast.items()}
        return sum(losses), count

    def clip(self, parameters, limit):
        """Scales the gradients by hand; returns their norm."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def step(self, index):
        for number, row in enumerate(self.rows):
            if row is None or (not row["carry"] and row["position"] == len(row["text"])):
                self.rows[number] = self.enter(number < self.carry_rows)
        for number in range(1, 1 + self.unroll):  # what carries on needs text for each segment
            for row in self.rows:
                while row["carry"] and len(row["text"]) < row["position"] + number * SEGMENT:
                    row["text"] = np.concatenate([row["text"], self.next_text()])
        read = [self.read_row(row) for row in self.rows]
        tokens = sum(count for _, count in read)
        loss = sum(total for total, _ in read) / tokens
        self.optimizer.zero_grad()
        self.model_optimizer.zero_grad()
        if loss.requires_grad:  # not where nothing that is learned comes before a loss
            loss.backward()
        values = {"loss": loss.item(), "tokens": float(tokens)}
        values |= {"fallbacks": 0.0, "skipped": 0.0}
        values["rule_gradient_norm"] = self.clip(list(self.rule.parameters()), 0.05)
        self.optimizer.param_groups[0]["lr"] = 0.03 * schedule(index)
        self.optimizer.step()
        if self.joint:
            before = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
            values["model_gradient_norm"] = self.clip(list(self.leaves.values()), 0.2)
            self.model_optimizer.param_groups[0]["lr"] = 0.02 * schedule(index)
            self.model_optimizer.step()
            for row in self.rows:
                for name in self.names:
                    row["fast"][name] += self.leaves[name].detach() - before[name]
        return values


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("adapt", ["some", "all"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("unroll", "surprise", "carry_rows"),
    [(UNROLL, 0.0, 0), (3, 0.0, 0), (3, 0.5, 0), (UNROLL, 0.0, 1), (3, 0.0, ROWS)],
)
def test_steps_equal_plain_autograd(
    meta_training,
    articles,
    plain_nats,
    plain_state,
    learned_update,
    unroll,
    surprise,
    carry_rows,
    joint,
    adapt,
    granularity,
):
    """Rows end inside of an unroll and take new articles, from W_0 or carrying on."""
    config = dataclasses.replace(
        JOINT if joint else FROZEN, unroll=unroll, surprise=surprise, carry_rows=carry_rows
    )
    training = meta_training(joint, adapt, granularity, config=config)
    reference = Reference(training, articles, plain_nats, plain_state, learned_update)
    start = {name: weight.clone() for name, weight in training.rule.state_dict().items()}
    for index in range(12 // unroll):
        found, expected = training.step(index), reference.step(index)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-7, err_msg=name)
    assert training.passes.state_dict()["entered"] == reference.entered > 4 - carry_rows
    for name, weight in reference.rule.state_dict().items():
        torch.testing.assert_close(training.rule.state_dict()[name], weight, rtol=1e-6, atol=1e-8)
    moved = [n for n, w in training.rule.state_dict().items() if not torch.equal(w, start[n])]
    assert len(moved) == 4 * len(training.rule.names)
    for name, leaf in reference.leaves.items():
        weight = training.model.get_parameter(name).detach()
        torch.testing.assert_close(weight, leaf.detach(), rtol=1e-6, atol=1e-8)
    for name, weight in training.fast.items():
        expected = torch.stack([row["fast"][name] for row in reference.rows])
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)


def test_the_model_stays_as_it_is_while_the_rule_is_trained(meta_training):
    training = meta_training()
    before = {name: weight.clone() for name, weight in training.model.state_dict().items()}
    for index in range(3):
        training.step(index)
    for name, weight in training.model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert not any(weight.requires_grad for weight in training.model.parameters())


@pytest.mark.parametrize("joint", [False, True])
def test_checkpointed_segments_change_nothing(meta_training, joint):
    config = dataclasses.replace(JOINT if joint else FROZEN, unroll=5)
    plain = meta_training(joint, config=config)
    kept = meta_training(joint, config=dataclasses.replace(config, checkpoint_every=2))
    for index in range(3):
        found, expected = kept.step(index), plain.step(index)
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-12)
    expected, found = plain.state_dict()[0], kept.state_dict()[0]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("carry_rows", [0, 1])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("stopped_after", [1, 3, 4])
def test_a_resumed_training_equals_an_unbroken_one(meta_training, joint, stopped_after, carry_rows):
    config = dataclasses.replace(JOINT if joint else FROZEN, carry_rows=carry_rows)
    unbroken = meta_training(joint, config=config)
    for index in range(6):
        unbroken.step(index)
    broken = meta_training(joint, config=config)
    for index in range(stopped_after):
        broken.step(index)
    tensors, meta = broken.state_dict()
    again = meta_training(joint, seed=9, config=config)
    again.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    for index in range(stopped_after, 6):
        again.step(index)
    expected, form = unbroken.state_dict()
    found, found_form = again.state_dict()
    assert form == found_form
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


class Broken(AbstractUpdateRule):
    """W <- W - exp(a) g; the first row's weights become nan once, when told to."""

    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.strike = -1

    def forward(self, fast, gradients, slow, state, coefficients=None):
        self.strike -= 1
        new = {n: weight - self.log_rate.exp() * gradients[n] for n, weight in fast.items()}
        if self.strike == 0:
            hit = torch.tensor([math.nan, 0.0], dtype=torch.float64)
            new = {n: w + hit.view(-1, *(1,) * (w.dim() - 1)) for n, w in new.items()}
        return new, state


@pytest.fixture
def breaking(tiny_model, articles):
    def build(strike, joint):
        model = tiny_model()
        rule, names = Broken(), ("embedding.weight", "decoder.bias")
        rule.strike = strike
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if joint else None
        return MetaTraining(
            model,
            rule,
            names,
            articles,
            JOINT if joint else FROZEN,
            schedule,
            SEED,
            optimizer,
            (lambda index: 0.01) if joint else None,
        )

    return build


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("strike", [1, 2])
def test_a_row_that_blows_up_falls_back_and_is_counted(breaking, joint, strike):
    """Whether the weights broke in the last update of the step or in an earlier one."""
    training = breaking(strike, joint)
    parameters = [*training.rule.parameters(), *training.model.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    values = training.step(0)
    assert values["fallbacks"] == 1
    assert values["skipped"] == (strike < UNROLL)
    assert all(math.isfinite(value) for value in values.values())
    for name, weight in training.fast.items():
        assert torch.equal(weight[0], training.slow[name])
        assert weight.isfinite().all()
    for layer in training.state:
        assert not layer.hidden[0].any()
        assert layer.hidden[1].any()
    for parameter, old in zip(parameters, before, strict=True):
        assert parameter.isfinite().all()
        if values["skipped"]:
            assert torch.equal(parameter, old)
    assert training.step(1)["fallbacks"] == 0


def test_nobody_learns_from_a_gradient_that_is_not_finite(meta_training):
    """The first row's weights are finite and so large that the gradient is not."""
    training = meta_training(True, "all")
    training.step(0)
    for weight in training.fast.values():
        weight[0] *= 1e200
    parameters = [*training.rule.parameters(), *training.model.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    assert training.step(1)["skipped"] == 1
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("of_the_model", [False, True])
def test_nobody_learns_where_one_of_two_gradients_is_not_finite(meta_training, of_the_model):
    training = meta_training(True, "all")
    training.step(0)
    learned = [*training.rule.parameters(), *training.model.parameters()]
    before = [parameter.detach().clone() for parameter in learned]
    broken = learned[-1] if of_the_model else learned[0]
    hook = broken.register_hook(lambda gradient: gradient * torch.nan)
    assert training.step(1)["skipped"] == 1
    for parameter, old in zip(learned, before, strict=True):
        assert torch.equal(parameter, old)
    hook.remove()
    assert training.step(2)["skipped"] == 0
    assert not torch.equal(learned[0], before[0])


@pytest.mark.parametrize("joint", [False, True])
def test_a_row_with_huge_but_finite_weights_falls_back_at_once(meta_training, joint):
    """Its article goes on after that step; in the next one everybody learns again."""
    training = meta_training(joint)
    training.step(0)
    while max(left := tokens_left(training)) <= UNROLL * SEGMENT:
        training.step(0)
    row = left.index(max(left))
    for weight in training.fast.values():
        weight[row] *= 1e200
    values = training.step(1)
    assert all(weight.isfinite().all() for weight in training.fast.values())
    assert (values["fallbacks"], values["skipped"]) == (1, 1)
    for name, weight in training.fast.items():
        assert torch.equal(weight[row], training.slow[name])
    assert not training.state[0].hidden[row].any()
    assert tokens_left(training)[row] > 0
    values = training.step(2)
    assert (values["fallbacks"], values["skipped"]) == (0, 0)


def tokens_left(training):
    return [LENGTHS[number] - at for number, at in training.passes.rows.positions]


@pytest.mark.parametrize("kind", [RuleTrainingConfig, JointTrainingConfig])
def test_an_unroll_that_trains_no_rule_is_refused(kind):
    with pytest.raises(ValueError, match=r"trains no rule, .*expected unroll >= 2 .* found 1; do"):
        kind(unroll=1)
    with pytest.raises(ValueError, match=r"expected unroll >= 1 in mode 'forward', found 0"):
        kind(unroll=0, mode="forward")
    assert kind(unroll=1, mode="forward").unroll == 1


@pytest.mark.parametrize("kind", [RuleTrainingConfig, JointTrainingConfig])
@pytest.mark.parametrize("carry_rows", [-1, 3])
def test_more_rows_that_carry_on_than_rows_are_refused(kind, carry_rows):
    with pytest.raises(ValueError, match=f"from 0 to rows, that is 2, found {carry_rows}; do"):
        kind(rows=2, carry_rows=carry_rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gates"}, "expected 'rates', 'gated', 'lstm', 'momentum', found 'gates'"),
        ({"hidden": 3}, "a rule of kind 'rates' has no setting 'hidden'"),
        ({"kind": "lstm", "sees": ("loss",)}, "a rule of kind 'lstm' has no setting 'sees'"),
        ({"kind": "gated", "sees": ("tea",)}, "the gates cannot see 'tea'"),
        ({"kind": "gated", "hidden": -1}, "impossible hidden layer"),
        ({"kind": "gated", "mode": "forward"}, "AbstractStepRule, found Gated; .*mode='reverse'"),
    ],
)
def test_rules_that_do_not_exist_are_refused_with_the_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        RuleTrainingConfig(**settings)


def test_settings_reach_the_starting_rule(tiny_model, statistics):
    rms = statistics(tiny_model())
    config = RuleTrainingConfig(kind="gated", hidden=3, sees=("loss", "rms"))
    rule, other = starting_rule(rms, config, seed=1), starting_rule(rms, config, seed=2)
    assert isinstance(rule, Gated)
    assert (rule.hidden, rule.sees, rule.sees_of_row) == (3, ("rms",), ("loss",))
    assert not torch.equal(rule.from_row, other.from_row)
    assert starting_rule(rms, RuleTrainingConfig(kind="lstm")).hidden == 8
    assert starting_rule(rms, RuleTrainingConfig(kind="lstm", hidden=2)).hidden == 2


@pytest.mark.parametrize("kind", get_args(RuleKind))
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_starting_rule_is_krauses(tiny_model, statistics, granularity, kind):
    model = tiny_model()
    rms = statistics(model)
    rule = starting_rule(rms, RuleTrainingConfig(granularity=granularity, kind=kind))
    mean = sum(float(tensor.mean()) for tensor in rms.values()) / len(rms)
    krause = RmsDecay(rms, 2e-4, 1e-3, 0.7 * mean)
    slow = {name: weight.detach() for name, weight in model.named_parameters()}
    fast = {name: weight + 0.3 for name, weight in slow.items()}
    found, _ = rule(fast, slow, slow, None)
    expected, _ = krause(fast, slow, slow, None)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=1e-9, atol=1e-12)


class Repeated:
    """Stands for a graph: calls what was captured with tensors of its own, in and out.

    Whatever the function changes beside these has to stay where it was at the first call.
    """

    def __init__(self, function):
        self.function, self.training, self.places = function, function.__self__, None

    def __call__(self, *tensors):
        found = self.function(*(tensor.clone() for tensor in tensors))
        training = self.training
        kept = [*training.fast.values(), *training.traces.values()]
        kept += [parameter.grad for parameter in training._learned()]
        places = [tensor.data_ptr() for tensor in kept]
        assert self.places in (None, places)
        self.places = places
        return tuple(tensor.clone() for tensor in found)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_captured_step_trains_the_same(meta_training, joint, dropout):
    """In memory that stays, and with losses that all count alike at first."""
    config = dataclasses.replace(JOINT if joint else FROZEN, mode="forward")
    ends = []
    for captured in (False, True):
        torch.manual_seed(4)
        training = meta_training(joint, config=config, output_dropout=dropout)
        if captured:
            training._captured = Repeated(training._in_place)
        values = [training.step(index) for index in range(9)]
        ends.append((values, training.state_dict()[0]))
    for one, other in zip(ends[1][0], ends[0][0], strict=True):
        assert one == pytest.approx(other, rel=1e-10)
    assert ends[0][1].keys() == ends[1][1].keys()
    for name, expected in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], expected, rtol=1e-9, atol=1e-11, msg=name)


def test_a_captured_step_asks_nowhere_what_a_number_is(meta_training, waiting, monkeypatch):
    monkeypatch.setattr("metalm.meta.forward_mode._check_rate", lambda name, rate: None)
    config = dataclasses.replace(JOINT, mode="forward")
    training = meta_training(True, config=config, output_dropout=0.3, weight_dropout=0.2)
    inside = training._in_place

    def watched(*tensors):
        with waiting:
            return inside(*tensors)

    training._captured = watched
    for index in range(3):
        training.step(index)
    assert not waiting.seen
