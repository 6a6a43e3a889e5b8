"""What counts and what is learnt from: plain graphs, and one loss named twice."""

import pytest
import torch

from metalm.meta.inner_problem import TwoLosses
from metalm.meta.rules import GradientDescent, LearnedRates, RmsDecay
from metalm.meta.unroll import unroll

RULES = {
    "descent": lambda tiny: GradientDescent(0.03, 0.1),
    "rms": lambda tiny: RmsDecay(tiny.rms, 0.01, 0.3, 0.1),
    "learned": lambda tiny: LearnedRates(tiny.rms, "row", 0.05, 0.2, 0.4, 1.0, "rms"),
}
WEIGHTS = [1.0, 0.0, 2.0, 1.0, 0.5]


def learnt_of(losses, parameters):
    """Another function of the weights: what is learnt from is no multiple of what counts."""
    return losses.square() + 0.3 * parameters["scale"].reshape(-1).sin() * losses.detach()


def apart(tiny):
    def loss(parameters, batch, state):
        losses, aux, state = tiny.loss(parameters, batch, state)
        return TwoLosses(losses, learnt_of(losses, parameters)), aux, state

    return loss


def leaves_of(tiny, rule):
    return [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]


def by_hand(tiny, rule, state, order):
    """One graph through the updates; at order 1 the gradients and the states are constants."""
    fast = {name: w.expand(tiny.rows, *w.shape) for name, w in tiny.slow.items()}
    counted, total = [], 0.0
    for batch, weight in zip(tiny.batches, WEIGHTS, strict=True):
        fast = {name: value.clone() for name, value in fast.items()}
        losses, _, after = tiny.loss({**fast, **tiny.rest}, batch, state)
        learnt = learnt_of(losses, fast).sum()
        gradients = torch.autograd.grad(learnt, list(fast.values()), create_graph=True)
        counted.append(losses.detach())
        total = total + weight * losses.sum()
        if order == 1:
            gradients = [gradient.detach() for gradient in gradients]
        state = after if order == 2 else after.detach()
        fast, _ = rule(fast, dict(zip(fast, gradients, strict=True)), tiny.slow, None)
    return total, torch.stack(counted), fast


@pytest.mark.parametrize("segment", [None, 2, "auto", "least"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", RULES)
def test_against_a_plain_graph(kind, order, segment, tiny, state):
    rule = RULES[kind](tiny)
    total, counted, fast = by_hand(tiny, rule, state, order)
    result = unroll(
        apart(tiny), rule, tiny.slow, tiny.rest, tiny.batches, state,
        rows=tiny.rows, weights=WEIGHTS, order=order, segment=segment, apart=True,
    )  # fmt: skip
    torch.testing.assert_close(result.meta_loss, total)
    torch.testing.assert_close(result.losses, counted)
    leaves = leaves_of(tiny, rule)
    found, expected = (
        torch.autograd.grad(0.7 * j + sum(w.square().sum() for w in last.values()), leaves)
        for j, last in ((result.meta_loss, result.fast), (total, fast))
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("update_last", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_reading_without_a_meta_gradient(overwrite, update_last, tiny, state):
    rule = RULES["rms"](tiny)
    _, counted, fast = by_hand(tiny, rule, state, 1)
    start = {name: w.detach().expand(tiny.rows, *w.shape).clone() for name, w in tiny.slow.items()}
    result = unroll(
        apart(tiny), rule, tiny.slow, tiny.rest, tiny.batches, state,
        fast=start, order=0, overwrite=overwrite, update_last=update_last,
    )  # fmt: skip
    torch.testing.assert_close(result.losses, counted)
    for name, weight in fast.items():
        same = torch.allclose(result.fast[name], weight, rtol=1e-10)
        assert same == update_last


@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_loss_named_twice_changes_no_bit(order, tiny, state):
    rule = RULES["learned"](tiny)

    def twice(parameters, batch, state):
        losses, aux, state = tiny.loss(parameters, batch, state)
        return TwoLosses(losses, losses), aux, state

    found = []
    for loss in (tiny.loss, twice):
        result = unroll(
            loss, rule, tiny.slow, tiny.rest, tiny.batches, state, rows=tiny.rows, order=order
        )
        gradients = []
        if order:
            gradients = torch.autograd.grad(result.meta_loss, leaves_of(tiny, rule))
        found.append([result.losses, *result.fast.values(), *gradients])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_an_unroll_that_does_not_know_says_so(tiny, state):
    arguments = (apart(tiny), RULES["rms"](tiny), tiny.slow, tiny.rest, tiny.batches, state)
    with pytest.raises(ValueError, match="found apart=False; do pass apart=True"):
        unroll(*arguments, rows=tiny.rows)
    with pytest.raises(ValueError, match="expected one loss a step, found two"):
        unroll(*arguments, rows=tiny.rows, mode="forward", apart=True)
