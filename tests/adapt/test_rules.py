"""Gradient statistics and learned rules for a model of one's own."""

import contextlib
import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch

from metalm.adapt import AdaptiveReader, count_gradients, krause_rule, learn_rule
from metalm.adapt.module_loss import Segment
from metalm.meta.rules import GradientDescent, LearnedRates, RmsDecay
from metalm.meta.rules.kinds import learned_rule
from metalm.meta.unroll import unroll


@pytest.fixture
def reader(recurrent):
    return AdaptiveReader(recurrent, segment=4, start_token=2)


def plain_rms(model, tokens, rows, segment, batch_first=True):
    """By the model's own backward pass: streams of equal length, state carried."""
    length = (len(tokens) - 1) // rows
    inputs = torch.tensor(tokens[: rows * length]).view(rows, length)
    targets = torch.tensor(tokens[1 : rows * length + 1]).view(rows, length)
    total = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    state, batches = None, 0
    for start in range(0, length, segment):
        x, y = inputs[:, start : start + segment], targets[:, start : start + segment]
        logits, state = model(x if batch_first else x.t(), state)
        logits = logits if batch_first else logits.transpose(0, 1)
        model.zero_grad()
        (-logits.log_softmax(-1).gather(2, y.unsqueeze(2))).mean().backward()
        for name, weight in model.named_parameters():
            total[name] += weight.grad**2
        state = (
            {"hidden": state["hidden"].detach()}
            if batch_first
            else tuple(part.detach() for part in state)
        )
        batches += 1
    model.zero_grad()
    return {name: (squares / batches).sqrt() for name, squares in total.items()}


@pytest.mark.parametrize(("streams", "rows"), [(1, 1), (2, 2), (100, 2)])
def test_gradients_are_counted_as_krause_counts_them(reader, texts, streams, rows):
    found = count_gradients(reader, texts, streams=streams)  # 44 tokens: room for 45 // 16 streams
    expected = plain_rms(reader.model, [2, *np.concatenate(texts)], rows, 4)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-14)


def test_gradients_of_a_model_with_time_first(plain_lstm, texts):
    reader = AdaptiveReader(plain_lstm, segment=3, batch_first=False)
    found = count_gradients(reader, texts, streams=3)
    expected = plain_rms(plain_lstm, np.concatenate(texts), 3, 3, batch_first=False)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-14)
    assert all(weight.grad is None for weight in plain_lstm.parameters())


def test_krauses_rule_reads_as_the_rule_of_his_program(reader, texts):
    rms = count_gradients(reader, texts)
    mean = float(sum(values.mean() for values in rms.values()) / len(rms))
    rule = krause_rule(rms, rate=3e-2, decay=2e-2, eps=0.4)
    ours = reader.with_rule(rule).read(texts[0]).nats
    his = reader.with_rule(RmsDecay(rms, 3e-2, 2e-2, 0.4 * mean)).read(texts[0]).nats
    np.testing.assert_allclose(ours, his, rtol=1e-9)
    assert abs(ours - reader.read(texts[0]).nats).max() > 1e-3


def test_too_little_text(recurrent):
    with pytest.raises(ValueError, match="too little text; expected at least 2 tokens, found 1"):
        count_gradients(AdaptiveReader(recurrent), [[3]])


@pytest.mark.parametrize("text", [[1, 11, 2, 3, 4], [1, 2, 3, 4, 11]])
def test_a_token_beyond_the_vocabulary(reader, text):
    with pytest.raises(ValueError, match="beyond the model's vocabulary"):
        count_gradients(reader, [text])
    learning = reader.with_rule(krause_rule(count_gradients(reader, [[1, 2, 3, 4, 5]])))
    with pytest.raises(ValueError, match="beyond the model's vocabulary"):
        learn_rule(learning, [text * 2], steps=1)


def test_a_learned_rule_reads_better(reader):
    """A text that repeats itself, and a rule that starts far too slow."""
    text = [1, 7, 3, 9, 5] * 12
    rms = count_gradients(reader, [text])
    rule = krause_rule(rms, rate=1e-4)
    learning = reader.with_rule(rule)
    weights = {name: weight.clone() for name, weight in reader.model.state_dict().items()}
    before = learning.read(text).nats.mean()
    losses = learn_rule(learning, [text], steps=30, unrolled=5, learning_rate=0.3)
    after = learning.read(text).nats.mean()
    assert len(losses) == 30
    assert after < before - 0.2
    assert after < reader.read(text).nats.mean() - 0.2
    for name, weight in reader.model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert not any(parameter.requires_grad for parameter in rule.parameters())
    assert all(parameter.grad is None for parameter in rule.parameters())


def test_one_step_follows_the_meta_gradient(reader):
    """Adam's first step is the learning rate against the sign of each meta-gradient."""
    text = [1, 7, 3, 9, 5, 2, 2, 8]
    rule = krause_rule(count_gradients(reader, [text * 3]), rate=1e-2).requires_grad_(True)
    learning = reader.with_rule(rule)
    inputs, targets = torch.tensor([2, *text[:-1]]), torch.tensor(text)
    batches = [Segment(inputs[:4], targets[:4]), Segment(inputs[4:], targets[4:])]
    after = unroll(learning.loss, rule, learning.slow, learning.rest, batches, None)
    gradients = dict(
        zip(
            dict(rule.named_parameters()),
            torch.autograd.grad(after.meta_loss, list(rule.parameters())),
            strict=True,
        )
    )
    before = {name: value.detach().clone() for name, value in rule.named_parameters()}
    (loss,) = learn_rule(learning, [text], steps=1, unrolled=2, learning_rate=0.01, clip=1e9)
    assert loss == pytest.approx(after.losses.mean().item(), rel=1e-12)
    assert any(bool(gradient.abs() > 1e-5) for gradient in gradients.values())
    for name, value in rule.named_parameters():
        if abs(gradients[name]) > 1e-5:
            expected = before[name] - 0.01 * gradients[name].sign()
            torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-4)


def test_nothing_to_learn(reader, recurrent):
    with pytest.raises(ValueError, match="expected one with parameters, found NoneType"):
        learn_rule(reader, [[1, 2, 3]], steps=1)
    with pytest.raises(ValueError, match="expected one with parameters, found GradientDescent"):
        learn_rule(reader.with_rule(GradientDescent(0.1)), [[1, 2, 3]], steps=1)
    rule = krause_rule({"output.bias": torch.ones(11, dtype=torch.float64)})
    short = AdaptiveReader(recurrent, rule, segment=3)
    for texts, found in [([], "0 texts of at most 0"), ([[1], [2, 3, 4, 5]], "2 .* at most 3")]:
        with pytest.raises(ValueError, match=f"no loss follows an update .* 3 tokens .*{found}"):
            learn_rule(short, texts, steps=1)
    learn_rule(short, [[1, 2, 3, 4, 5]], steps=1)
    for wrong in ({"steps": 0}, {"steps": 1, "unrolled": 1}):
        with pytest.raises(ValueError, match="expected at least 1 step of 2 segments, found"):
            learn_rule(short, [[1, 2, 3, 4, 5]], **wrong)
    for wrong, message in [
        ({"order": 0}, "expected order 1 or 2, found 0"),
        ({"clip": float("nan")}, "impossible clip; expected a finite number > 0, found nan"),
        ({"clip": -1.0}, "impossible clip; expected a finite number > 0, found -1.0"),
        ({"learning_rate": 0.0}, "impossible learning_rate; .* found 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            learn_rule(short, [[1, 2, 3, 4, 5]], steps=1, **wrong)
    with pytest.raises(ValueError, match=r"there is no text; .* found 0"):
        count_gradients(short, [])


TEXT = [1, 7, 3, 9, 5, 2, 2, 8, 4, 1, 6, 6]


def learning_reader(model, rate=0.1):
    rms = {name: torch.rand_like(weight) + 0.1 for name, weight in model.named_parameters()}
    rule = LearnedRates.from_krause(rms, rate, 0.03, 0.2).requires_grad_(True)
    return AdaptiveReader(model, rule, segment=3, start_token=2)


def of_the_whole_text(reader, last, order=1):
    """Meta-gradients of the mean loss of the last segments, in one unroll from W_0."""
    inputs, targets = torch.tensor([2, *TEXT[:-1]]), torch.tensor(TEXT)
    batches = [Segment(inputs[i : i + 3], targets[i : i + 3]) for i in range(0, 12, 3)]
    weights = [0.0] * (4 - last) + [1.0 / last] * last
    after = unroll(
        reader.loss,
        reader.rule,
        reader.slow,
        reader.rest,
        batches,
        None,
        weights=weights,
        order=order,
    )
    return list(torch.autograd.grad(after.meta_loss, list(reader.rule.parameters())))


@contextlib.contextmanager
def steps_that_stand_still(rule):
    """What each step of Adam would be taken along."""
    found = []

    def step(_):
        found.append([parameter.grad.clone() for parameter in rule.parameters()])

    with mock.patch.object(torch.optim.Adam, "step", step):
        yield found


@pytest.mark.parametrize(("unrolled", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_forward_mode_learns_from_the_whole_text(recurrent, unrolled, steps):
    reader = learning_reader(recurrent)
    expected = of_the_whole_text(reader, unrolled)
    assert any(float(values.abs().max()) > 1e-4 for values in expected)
    with steps_that_stand_still(reader.rule) as found:
        learn_rule(reader, [TEXT], steps=steps, unrolled=unrolled, clip=1e9, mode="forward")
    assert len(found) == steps
    torch.testing.assert_close(found[-1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpoints", [None, 2, "least"])
def test_second_order_and_checkpoints_are_those_of_the_core(recurrent, checkpoints):
    reader = learning_reader(recurrent, rate=0.3)
    expected = of_the_whole_text(reader, 4, order=2)
    with steps_that_stand_still(reader.rule) as found:
        learn_rule(reader, [TEXT], steps=1, unrolled=4, clip=1e9, order=2, checkpoints=checkpoints)
        learn_rule(reader, [TEXT], steps=1, unrolled=4, clip=1e9)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
    second, first = (torch.cat([each.flatten() for each in every]) for every in found)
    assert not torch.allclose(first, second, rtol=1e-3)
    momentum = reader.with_rule(learned_rule("momentum", reader.rule))
    with pytest.raises(ValueError, match="no forward mode of this rule"):
        learn_rule(momentum, [TEXT], steps=1, mode="forward")


@pytest.mark.parametrize("kind", ["rates", "gated", "momentum", "lstm"])
@pytest.mark.parametrize("surprise", [0.0, 0.5])
def test_a_last_window_of_one_segment_teaches_nothing(recurrent, kind, surprise):
    """No update comes before its loss: the rule stays, the reading goes on."""
    rms = {name: torch.rand_like(weight) + 0.1 for name, weight in recurrent.named_parameters()}
    text = [1, 7, 3, 9, 5, 2, 2, 8, 4]
    start = learned_rule(kind, LearnedRates.from_krause(rms, 0.1, 0.03, 0.2))
    states = []
    for steps in (1, 2):
        rule = copy.deepcopy(start)
        reader = AdaptiveReader(recurrent, rule, segment=3, start_token=2, surprise=surprise)
        losses = learn_rule(reader, [text], steps=steps, unrolled=2)
        assert len(losses) == steps
        assert all(math.isfinite(loss) for loss in losses)
        states.append(rule.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value)
    assert any(
        not torch.equal(value, start.state_dict()[name]) for name, value in states[0].items()
    )
