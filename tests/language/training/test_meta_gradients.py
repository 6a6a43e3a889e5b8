"""Each way to take the meta-gradient, on the language model and in the training."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from metalm.language.network.segment_loss import SegmentLoss
from metalm.language.text.article_batches import SegmentBatch
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import JointTrainingConfig, RuleTrainingConfig
from metalm.meta.parameters import choose, split
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule

pytestmark = pytest.mark.parametrize(
    ("cell", "cutoffs"), [("lstm", ()), ("qrnn", ()), ("lstm", (4, 7))], ids=str
)

ADAPT = {
    "all": ("*",),
    "some": ("embedding.*", "layers.1.input_weight", "*_bias"),
    "output": ("decoder.bias",),
}
LENGTHS = (7, 10, 5, 14)


def learned_rule(model, names, statistics, **changes):
    rms = {name: statistics(model)[name] for name in names}
    settings = {"rate": 0.3, "decay": 0.05, "exponent": 0.4, "eps": 0.8} | changes
    return LearnedRates(rms, **settings)


def segments(steps, time, rows):
    generator = torch.Generator().manual_seed(3)
    return [
        SegmentBatch(
            *torch.randint(0, 11, (2, time, rows), generator=generator),
            (torch.rand(time, rows, generator=generator) > 0.2).double(),
        )
        for _ in range(steps)
    ]


@pytest.fixture
def problem(tiny_model, statistics):
    """Builds what `unroll` takes, and everything that a meta-gradient goes to, by name."""

    def build(adapt, dtype=torch.float64):
        model = tiny_model(dtype=dtype)
        slow, rest = split(model, choose(model, ADAPT[adapt]))
        rule = learned_rule(model, slow, statistics, granularity="row")
        batches = segments(steps=3, time=4, rows=2)
        batches = [batch._replace(mask=batch.mask.to(dtype)) for batch in batches]
        arguments = (SegmentLoss(model, 4), rule, slow, rest, batches, model.initial_state(2))
        return arguments, {**slow, **rest, **dict(rule.named_parameters())}

    return build


@pytest.mark.parametrize(("adapt", "segment"), [("all", 2), ("some", None), ("output", None)])
def test_second_order_against_finite_differences_of_the_reading(adapt, segment, problem):
    """With weights per row; hidden states move along, as they do when the model reads."""
    arguments, leaves = problem(adapt)

    def read():
        return unroll(*arguments, rows=2, order=0).meta_loss.item()

    exact = unroll(*arguments, rows=2, order=2, segment=segment).meta_loss
    gradients = dict(zip(leaves, torch.autograd.grad(exact, list(leaves.values())), strict=True))
    generator = torch.Generator().manual_seed(2)
    _, rule, slow, rest, *_ = arguments
    for group in (slow, rest, dict(rule.named_parameters())):
        directions = {
            name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            for name, leaf in group.items()
        }

        def moved(times, group=group, directions=directions):
            with torch.no_grad():
                for name, leaf in group.items():
                    leaf.add_(directions[name], alpha=times * 5e-4)
            return read()

        # Central difference of fourth order: one place after the other, and back.
        values = [moved(by) for by in (1, 1, -3, -1)]
        moved(2)
        slope = (8 * (values[0] - values[2]) - (values[1] - values[3])) / (12 * 5e-4)
        found = sum((gradients[name] * directions[name]).sum().item() for name in group)
        assert found == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("adapt", ["all", "some"])
def test_second_order_in_bfloat16_points_the_same_way(adapt, problem):
    found = []
    for lower in (False, True):
        (loss, *others), leaves = problem(adapt, torch.float32)

        def rounded(*arguments, loss=loss, lower=lower):
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                return loss(*arguments)

        exact = unroll(rounded, *others, rows=2, order=2).meta_loss
        gradients = torch.autograd.grad(exact, list(leaves.values()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert torch.cosine_similarity(*found, dim=0) > 0.995
    assert not torch.equal(*found)


# ---- in the training ----

WAYS = {
    "first order": {},
    "second order": {"order": 2},
    "second order, checkpoints": {"order": 2, "checkpoint_every": 2},
    "second order, by surprise": {"order": 2, "checkpoint_every": "auto", "surprise": 0.5},
    "forward": {"mode": "forward"},
}
SIZES = {"rows": 2, "segment": 3, "unroll": 3, "bfloat16": False}


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in LENGTHS])


@pytest.fixture
def meta_training(tiny_model, articles, statistics):
    def build(joint, schedule=lambda index: 1.0, seed=0, **settings):
        model = tiny_model(seed=seed)
        names = choose(model, ADAPT["some"])
        kind = JointTrainingConfig if joint else RuleTrainingConfig
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0) if joint else None
        return MetaTraining(
            model,
            learned_rule(model, names, statistics),
            names,
            articles,
            kind(learning_rate=0.03, **SIZES | settings),
            schedule,
            6,
            optimizer,
            (lambda index: 0.02 * schedule(index)) if joint else None,
        )

    return build


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("joint", [False, True])
def test_a_resumed_training_equals_an_unbroken_one(joint, way, meta_training):
    unbroken = meta_training(joint, **WAYS[way])
    start = {name: p.detach().clone() for name, p in unbroken.rule.named_parameters()}
    for index in range(5):
        values = unbroken.step(index)
        assert values["skipped"] == values["fallbacks"] == 0
    for name, parameter in unbroken.rule.named_parameters():
        assert not torch.equal(parameter, start[name])
    broken = meta_training(joint, **WAYS[way])
    for index in range(3):
        broken.step(index)
    tensors, meta = broken.state_dict()
    again = meta_training(joint, seed=9, **WAYS[way])
    again.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    for index in range(3, 5):
        again.step(index)
    (expected, form), (found, found_form) = unbroken.state_dict(), again.state_dict()
    assert form == found_form
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def gradients_of(training):
    parameters = {
        **dict(training.rule.named_parameters()),
        **dict(training.model.named_parameters()),
    }
    return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("joint", [False, True])
def test_checkpoints_change_nothing_at_second_order(joint, meta_training):
    plain = meta_training(joint, **WAYS["second order"])
    kept = meta_training(joint, **WAYS["second order, checkpoints"])
    first = meta_training(joint)
    for training in (plain, kept, first):
        training.step(0)
    expected, found, other = (gradients_of(training) for training in (plain, kept, first))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(other[name], gradient) for name, gradient in expected.items())


class LongPast:
    """The same reading, row after row, with the whole past of each article in one graph."""

    def __init__(self, training, articles, joint, plain_nats, plain_state, learned_update):
        self.training, self.texts = training, [article.tokens for article in articles]
        self.plain_nats, self.plain_state, self.update = plain_nats, plain_state, learned_update
        self.leaves = {n: w.detach().clone() for n, w in training.model.named_parameters()}
        for leaf in self.leaves.values():
            leaf.requires_grad_(joint)
        self.rule = copy.deepcopy(training.rule)
        self.order = itertools.chain.from_iterable(
            np.random.default_rng([6, number]).permutation(len(self.texts))
            for number in itertools.count()
        )
        self.rows = [None, None]

    def learned(self):
        """What is learned, by name."""
        learned = {**dict(self.rule.named_parameters()), **self.leaves}
        return {name: leaf for name, leaf in learned.items() if leaf.requires_grad}

    def step(self):
        """The mean loss of the next segments, its inner gradients held constant."""
        for number, row in enumerate(self.rows):
            if row is None or row["position"] == len(row["text"]):
                self.rows[number] = {
                    "text": self.texts[next(self.order)],
                    "position": 0,
                    "fast": {name: self.leaves[name] for name in self.training.slow},
                    "state": self.plain_state(self.training.model),
                }
        unroll = self.training.config.unroll
        read = [self.segment(row) for row in self.rows for _ in range(unroll)]
        return sum(loss for loss, _ in read) / sum(count for _, count in read)

    def segment(self, row):
        names, start = list(self.training.slow), row["position"]
        end = row["position"] = min(start + 3, len(row["text"]))
        gradients, loss = [torch.zeros_like(self.leaves[name]) for name in names], 0.0
        if end > start:
            pair = [0, *row["text"]][start:end], row["text"][start:end]
            copies = {name: row["fast"][name].detach().requires_grad_() for name in names}
            nats, _, _ = self.plain_nats({**self.leaves, **copies}, *pair, row["state"])
            gradients = torch.autograd.grad(nats.sum() / 3, list(copies.values()))
            nats, _, state = self.plain_nats({**self.leaves, **row["fast"]}, *pair, row["state"])
            row["state"] = [(hidden.detach(), cell.detach()) for hidden, cell in state]
            loss = nats.sum()
        row["fast"] = {
            name: self.update(self.rule, name, row["fast"][name], gradient, self.leaves[name])
            for name, gradient in zip(names, gradients, strict=True)
        }
        return loss, end - start


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("joint", [False, True])
def test_forward_mode_sees_the_whole_article(
    joint, unroll, meta_training, articles, plain_nats, plain_state, learned_update
):
    """The learning rates are zero, so that the past of an article has one phi and one W_0."""
    limits = {"clip": 1e9} | ({"model_clip": 1e9} if joint else {})
    training = meta_training(joint, lambda index: 0.0, mode="forward", unroll=unroll, **limits)
    past = LongPast(training, articles, joint, plain_nats, plain_state, learned_update)
    for index in range(12 // unroll):
        values, loss = training.step(index), past.step()
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-9)
        found, learned = gradients_of(training), past.learned()
        for leaf in learned.values():
            leaf.grad = torch.zeros_like(leaf)
        if loss.requires_grad:  # not where nothing that is learned comes before a loss
            loss.backward(retain_graph=True)
        assert found.keys() == learned.keys()
        for name, leaf in learned.items():
            torch.testing.assert_close(found[name], leaf.grad, rtol=1e-8, atol=1e-10)
    assert training.passes.state_dict()["entered"] > 4


def test_a_trace_that_is_not_finite_falls_back(meta_training):
    training = meta_training(True, mode="forward", unroll=1)
    training.step(0)
    training.traces["embedding.weight"][0].fill_(torch.nan)
    values = training.step(1)
    assert values["fallbacks"] == 1
    assert values["skipped"] == 1
    assert all(trace.isfinite().all() for trace in training.traces.values())
    assert training.step(2)["skipped"] == 0


class Counting(AbstractUpdateRule):
    """W <- W - exp(a) n g, n the number of updates since the article began."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def initial_state(self, fast):
        rows = next(iter(fast.values())).shape[0]
        return {"updates": torch.zeros(rows, dtype=torch.float64)}

    def forward(self, fast, gradients, slow, state, coefficients=None):
        updates = state["updates"] + 1
        rate = self.log_rate.exp() * updates
        new = {
            name: weight - rate.view(-1, *(1,) * slow[name].dim()) * gradients[name]
            for name, weight in fast.items()
        }
        return new, {"updates": updates}


@pytest.mark.parametrize("order", [1, 2])
def test_a_rules_state_begins_anew_with_each_article(order, tiny_model, articles):
    training = MetaTraining(
        tiny_model(),
        Counting(),
        ("embedding.weight", "decoder.bias"),
        articles,
        RuleTrainingConfig(learning_rate=0.0, **SIZES | {"unroll": 2, "order": order}),
        lambda index: 1.0,
        6,
    )
    for index in range(8):
        training.step(index)
        # Two updates a step of up to six tokens, also where the article ends in the first.
        expected = [2 * -(-position // 6) for _, position in training.passes.rows.positions]
        assert training.rule_state["updates"].tolist() == expected
    assert training.passes.state_dict()["entered"] > 3


def test_recipes_that_do_not_fit(meta_training, tiny_model, articles):
    with pytest.raises(ValueError, match="order 3 and mode 'reverse'"):
        RuleTrainingConfig(order=3)
    with pytest.raises(ValueError, match="order 1 and mode 'backward'"):
        JointTrainingConfig(mode="backward")
    for wrong in ({"order": 2}, {"checkpoint_every": 2}, {"checkpoint_every": "auto"}):
        with pytest.raises(ValueError, match="forward mode has order 1 and needs no checkpoints"):
            dataclasses.replace(RuleTrainingConfig(mode="forward"), **wrong)
    with pytest.raises(ValueError, match=r"learns from what counts; .* found 0.5"):
        JointTrainingConfig(mode="forward", surprise=0.5)
    with pytest.raises(ValueError, match="a finite number from 0, found -1"):
        JointTrainingConfig(surprise=-1)
    with pytest.raises(ValueError, match="AbstractStepRule, found Counting"):
        MetaTraining(
            tiny_model(), Counting(), ("decoder.bias",), articles,
            RuleTrainingConfig(mode="forward"), lambda index: 1.0, 6,
        )  # fmt: skip
