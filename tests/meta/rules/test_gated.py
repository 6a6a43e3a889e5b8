"""What the contract of rules does not say of the gated one: its start, its gates, its memory."""

import pytest
import torch

from metalm.meta.rules import Gated, LearnedRates
from metalm.meta.unroll import unroll

SEES = {"linear": {}, "hidden": {"hidden": 5}, "row alone": {"sees": ("loss", "surprise")}}


def rates_of(rms):
    return LearnedRates(rms, "row", rate=0.02, decay=0.2, exponent=0.4, decay_shape="rms")


def shake(rule, scale=0.5):
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in rule.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise)
    return rule


def run(rule, tiny, state, **settings):
    result = unroll(
        tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, fast=tiny.start(), **settings
    )
    return result, (result.meta_loss + sum(w.square().sum() for w in result.fast.values()))


@pytest.mark.parametrize("kind", SEES)
def test_starts_as_the_learned_rates(kind, tiny, state):
    """Along a whole unroll, and in every meta-gradient that the learned rates have."""
    plain, total = run(rates_of(tiny.rms), tiny, state)
    rates = rates_of(tiny.rms)
    rule = Gated(rates, **SEES[kind])
    gated, other_total = run(rule, tiny, state)
    torch.testing.assert_close(gated.losses, plain.losses, rtol=1e-13, atol=0)
    leaves = [*tiny.slow.values(), *tiny.rest.values()]
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    found = torch.autograd.grad(other_total, leaves, retain_graph=True)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
    other_total.backward()
    learns = [name for name, phi in rule.named_parameters() if phi.grad is not None]
    assert any(bool(rule.get_parameter(name).grad.any()) for name in learns if "rates" not in name)


def test_starts_with_the_meta_gradient_of_the_learned_rates(tiny, state):
    plain, rates = rates_of(tiny.rms), rates_of(tiny.rms)
    expected, found = (
        torch.autograd.grad(run(rule, tiny, state)[1], list(learned.parameters()))
        for rule, learned in ((plain, plain), (Gated(rates), rates))
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", SEES)
def test_checkpointed_segments_give_the_same_meta_gradient(kind, tiny, state):
    rule = shake(Gated(rates_of(tiny.rms), **SEES[kind]))
    leaves = [*tiny.slow.values(), *rule.parameters()]
    found = [
        torch.autograd.grad(run(rule, tiny, state, segment=segment)[1], leaves)
        for segment in (None, 2)
    ]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_mean_gates_are_those_of_the_step(tiny):
    """Read off the step itself: without a distance from W_0 it is u s g, without g it is f d."""
    rule = shake(Gated(rates_of(tiny.rms)))
    slow = {name: weight.detach() for name, weight in tiny.slow.items()}
    home = {name: weight.expand(tiny.rows, *weight.shape).clone() for name, weight in slow.items()}
    pushed = {name: weight.sin() for name, weight in tiny.start().items()}
    still = {name: torch.zeros_like(weight) for name, weight in home.items()}
    away = tiny.start()
    rates = rule.rates.coefficients().rates
    moved, first = rule(home, pushed, slow, None)
    fell, second = rule(away, still, slow, None)
    for name in slow:
        update = (home[name] - moved[name]) / (rates[name] * pushed[name])
        flush = (fell[name] - away[name]) / (slow[name] - away[name])
        for row in range(tiny.rows):
            gates = rule.mean_gates(first)[name][row, 0], rule.mean_gates(second)[name][row, 1]
            means = update[row].mean(), flush[row].mean()
            torch.testing.assert_close(gates, means, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shut_and_open_gates_are_copy_and_flush(dtype, tiny):
    slow, fast = (
        {n: w.detach().to(dtype) for n, w in t.items()} for t in (tiny.slow, tiny.start())
    )
    rule = Gated(rates_of({name: rms.to(dtype) for name, rms in tiny.rms.items()}))
    gradients = {name: torch.full_like(weight, 1e30) for name, weight in fast.items()}
    for bias, expected in (((-1e9, -1e9), fast), ((-1e9, 1e9), slow)):
        rule.bias.data.copy_(torch.tensor(bias))
        calm = {name: gradient * 1e-30 for name, gradient in gradients.items()}
        new, _ = rule(fast, calm, slow, None)
        for name, weight in new.items():
            torch.testing.assert_close(weight, expected[name].expand_as(weight), rtol=0, atol=1e-6)
        new, _ = rule(fast, gradients, slow, None)
        assert all(bool(weight.isfinite().all()) for weight in new.values())


def test_a_rate_scale_of_zero_leaves_the_weights(tiny):
    rule = shake(Gated(rates_of(tiny.rms)))
    rule.rate_scale.fill_(0.0)
    slow = {name: weight.detach() for name, weight in tiny.slow.items()}
    fast = {name: weight.expand(2, *weight.shape) for name, weight in slow.items()}
    new, _ = rule(fast, fast, slow, None)
    assert all(torch.equal(new[name], fast[name]) for name in fast)


def test_scales_and_names_are_those_of_the_rates(tiny):
    rates = rates_of(tiny.rms)
    rule = Gated(rates)
    assert rule.names == tuple(tiny.rms)
    rule.rate_scale.fill_(3.0)
    rule.decay_scale.fill_(2.0)
    assert (rates.rate_scale.item(), rates.decay_scale.item()) == (3.0, 2.0)


def test_every_number_is_saved(tiny):
    source = shake(Gated(rates_of(tiny.rms), hidden=3))
    ones = {name: torch.ones_like(rms) for name, rms in tiny.rms.items()}
    target = Gated(rates_of(ones), hidden=3, seed=9)
    target.load_state_dict(source.state_dict())
    slow, fast = tiny.slow, tiny.start()
    one, two = (rule(fast, fast, slow, None)[0] for rule in (source, target))
    assert all(torch.equal(one[name], two[name]) for name in fast)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.0}, "expected a decay > 0 at the start, found 0"),
        ({"hidden": -1}, "expected >= 0 units, found -1"),
        ({"sees": ("loss", "sound")}, "cannot see 'sound'; expected some of gradient, weight"),
    ],
)
def test_refused_settings(settings, message, tiny):
    decay = settings.pop("decay", 0.2)
    with pytest.raises(ValueError, match=message):
        Gated(LearnedRates(tiny.rms, decay=decay), **settings)
