"""Checkpoints: the same numbers to the bit, and memory that grows as the square root."""

import math

import pytest
import torch

from metalm.meta import checkpointing
from metalm.meta.checkpoint_schedule import Fitting, StepBytes
from metalm.meta.module_fork import fork
from metalm.meta.rules import GradientDescent, LearnedRates
from metalm.meta.segment_length import Budget
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule


class Momentum(AbstractUpdateRule):
    """A rule with a state and a parameter that it uses without `coefficients`."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def initial_state(self, fast):
        return [(torch.zeros_like(weight), torch.tensor(3)) for weight in fast.values()]

    def forward(self, fast, gradients, slow, state, coefficients=None):
        following = [
            (self.beta * velocity + gradients[name], count + 1)
            for name, (velocity, count) in zip(fast, state, strict=True)
        ]
        new = {
            name: weight - 0.02 * velocity
            for (name, weight), (velocity, _) in zip(fast.items(), following, strict=True)
        }
        return new, following


RULES = {
    "descent": lambda tiny: GradientDescent(0.03, 0.1),
    "learned": lambda tiny: LearnedRates(tiny.rms, "row", 0.02, 0.2, 0.5, 1.0, "rms"),
    "momentum": lambda tiny: Momentum(),
}


def dropped(tiny):
    """The tiny loss under dropout, whose masks a recomputation must repeat."""

    def loss(parameters, batch, state):
        inputs, targets = batch
        return tiny.loss(parameters, (torch.dropout(inputs, 0.4, True), targets), state)

    return loss


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("segment", [1, 2, 3, 5, 9, "auto", "least", Budget(10_000)])
@pytest.mark.parametrize("kind", RULES)
def test_segments_change_no_bit_of_what_is_read(kind, segment, order, tiny, state):
    rule = RULES[kind](tiny)
    leaves = [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]
    weights = [1.0, 0.5, 1.0, 0.0, 2.0]
    results = []
    for chosen in (None, segment):
        torch.manual_seed(8)
        result = unroll(
            dropped(tiny), rule, tiny.slow, tiny.rest, tiny.batches, state,
            rows=tiny.rows, weights=weights, order=order, segment=chosen,
        )  # fmt: skip
        after = torch.get_rng_state()
        total = 0.7 * result.meta_loss + sum(w.square().sum() for w in result.fast.values())
        gradients = torch.autograd.grad(total, leaves)
        assert torch.equal(torch.get_rng_state(), after)
        results.append((result, gradients, after))
    (whole, expected, random), (parts, got, same_random) = results
    assert torch.equal(random, same_random)
    assert torch.equal(whole.losses, parts.losses)
    assert torch.equal(whole.state, parts.state)
    assert all(torch.equal(whole.fast[name], parts.fast[name]) for name in whole.fast)
    assert [a.tolist() for a in whole.aux] == [a.tolist() for a in parts.aux]
    torch.testing.assert_close(whole.meta_loss, parts.meta_loss, rtol=1e-14, atol=0)
    # Sums over steps are taken in another order, so gradients agree to rounding.
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("update_last", [True, False])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("cut", ["auto", "least"])
@pytest.mark.parametrize("kind", RULES)
def test_parts_of_parts(kind, cut, order, update_last, tiny, state, monkeypatch):
    """Four parts wait at most, each is cut again, and what is drawn is drawn again."""
    rule, batches = RULES[kind](tiny), (tiny.batches * 4)[:17]
    schedule = Fitting(17, StepBytes(10, 9), 10 + 3 * 9)
    assert schedule.cost > 17
    monkeypatch.setattr(checkpointing, "schedule_of", lambda *_: schedule)
    leaves = [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]
    found = []
    for segment in (None, cut):
        torch.manual_seed(8)
        result = unroll(
            dropped(tiny), rule, tiny.slow, tiny.rest, batches, state,
            rows=tiny.rows, order=order, segment=segment, update_last=update_last,
        )  # fmt: skip
        total = result.meta_loss + sum(w.square().sum() for w in result.fast.values())
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        second = torch.autograd.grad(total, leaves)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        found.append((result.losses, *result.fast.values(), torch.get_rng_state(), *first))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def test_w_0_that_changes_before_the_backward_pass_is_noticed(tiny, state):
    result = unroll(
        tiny.loss, GradientDescent(0.03), tiny.slow, tiny.rest, tiny.batches, state,
        rows=tiny.rows, segment=2,
    )  # fmt: skip
    with torch.no_grad():
        tiny.slow["in.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.meta_loss.backward()


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize("kind", RULES)
def test_a_cut_frees_the_last_update(kind, segment, tiny, state, live_bytes):
    rule, found, held = RULES[kind](tiny), [], []
    leaves = [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]
    for cut in (False, True):
        counter = live_bytes()
        result = unroll(
            counter.watch(tiny.loss), rule, tiny.slow, tiny.rest, tiny.batches, state,
            rows=tiny.rows, order=2, segment=segment,
        )  # fmt: skip
        result = result.cut() if cut else result
        found.append(torch.autograd.grad(result.meta_loss, leaves))
        held.append(counter.count())
        assert cut != any(w.requires_grad for w in result.fast.values())
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    if segment is None:  # W and g of the last update; with checkpoints its graph is gone anyway
        assert held[0] > held[1]
    else:
        assert held[0] == held[1]


@pytest.mark.parametrize("kind", ["descent", "learned"])
def test_memory_grows_as_the_square_root(kind, tiny, state, live_bytes):
    def held(steps, segment):
        counter = live_bytes()
        rule = RULES[kind](tiny)
        before = sum(w.numel() * 8 for w in (*tiny.slow.values(), *tiny.rest.values()))
        result = unroll(
            counter.watch(tiny.loss), rule, tiny.slow, tiny.rest, (tiny.batches * steps)[:steps],
            state, rows=tiny.rows, segment=segment,
        )  # fmt: skip
        result.meta_loss.backward()
        del result
        assert counter.count() == before
        return counter.peak

    lengths = (9, 36, 144)
    whole = [held(steps, None) for steps in lengths]
    parts = [held(steps, math.isqrt(steps)) for steps in lengths]
    one_step = tiny.rows * 8 * sum(w.numel() for w in tiny.slow.values())
    assert whole[2] - whole[1] == pytest.approx(108 * one_step, rel=0.02)
    # 3, 6, 12 checkpoints and as many gradients.
    assert parts[1] - parts[0] == pytest.approx(6 * one_step, rel=0.02)
    assert parts[2] - parts[1] == pytest.approx(12 * one_step, rel=0.02)
    assert parts[2] < whole[2] / 4


@pytest.mark.parametrize("segment", [1, 2, "auto", "least"])
@pytest.mark.parametrize("order", [1, 2])
def test_steps_are_taken_again_under_the_autocast_they_were_taken_under(order, segment):
    """Although the backward pass is outside of it."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x, y = torch.randn(6, 8), torch.randn(6, 4)
    loss = lambda model, batch: (model(batch[0]).float() - batch[1]).square().mean()  # noqa: E731
    found = []
    for cut in (None, segment):
        with torch.autocast("cpu", torch.bfloat16):
            task = fork(network)
            done = task.unroll(GradientDescent(0.2), [(x, y)] * 5, loss, order=order, segment=cut)
        assert not torch.is_autocast_enabled("cpu")
        found.append(torch.autograd.grad(done.meta_loss, list(network.parameters())))
        assert not torch.is_autocast_enabled("cpu")
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)


def test_segments_need_a_step(tiny, state):
    with pytest.raises(ValueError, match="at least 1 update, found 0"):
        unroll(
            tiny.loss, GradientDescent(0.1), tiny.slow, tiny.rest, tiny.batches, state,
            rows=tiny.rows, segment=0,
        )  # fmt: skip
