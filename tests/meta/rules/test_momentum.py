"""What the contract of rules does not say of momentum: start, recurrence, meta-gradient, memory."""

import pytest
import torch

from metalm.meta import tree
from metalm.meta.rules import LearnedRates, Momentum
from metalm.meta.unroll import unroll


def rates_of(rms, **settings):
    settings = {"rate": 0.02, "decay": 0.2, "exponent": 0.4, "decay_shape": "rms"} | settings
    return LearnedRates(rms, "row", **settings)


def shake(rule, scale=0.4):
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in rule.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise)
    return rule


def run(rule, tiny, state, **settings):
    settings = {"fast": tiny.start()} | settings
    result = unroll(tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, **settings)
    return result, result.meta_loss + sum(w.square().sum() for w in result.fast.values())


def test_starts_as_the_learned_rates(tiny, state):
    """The same bits along a whole unroll, and every meta-gradient that the learned rates have."""
    plain, rates = rates_of(tiny.rms), rates_of(tiny.rms)
    rule = Momentum(rates)
    result, total = run(rule, tiny, state)
    expected, expected_total = run(plain, tiny, state)
    assert torch.equal(result.losses, expected.losses)
    assert all(torch.equal(result.fast[name], expected.fast[name]) for name in expected.fast)
    leaves = [*tiny.slow.values(), *tiny.rest.values()]
    found = torch.autograd.grad(total, [*leaves, *rates.parameters()], retain_graph=True)
    known = torch.autograd.grad(expected_total, [*leaves, *plain.parameters()])
    for one, two in zip(found, known, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
    for name in rule.names:
        to_share, to_keep = torch.autograd.grad(
            total, [rule.learned(kind, name) for kind in ("share", "keep_logit")], retain_graph=True
        )
        assert to_share != 0
        assert to_keep == 0  # no share, no matter of what


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_torchs_momentum_is_a_member(tiny, nesterov, in_place):
    """SGD with momentum, as torch has it, on gradients that follow nobody's steps."""
    rate, beta = 0.03, 0.7
    factor = 1 + beta if nesterov else 1.0
    share = beta**2 / (1 - beta**2) if nesterov else beta / (1 - beta)
    own = LearnedRates(tiny.rms, rate=rate * factor, decay=0.0, exponent=0.0)
    rule = Momentum(own, keep=beta).requires_grad_(False)
    for name in rule.names:
        rule.learned("share", name).fill_(share)
    fast = tiny.start()
    leaves = {name: weight.clone().requires_grad_() for name, weight in fast.items()}
    sgd = torch.optim.SGD(leaves.values(), lr=rate, momentum=beta, nesterov=nesterov)
    state = rule.initial_state(fast)
    for number in range(5):
        gradients = {name: (weight + number).sin() for name, weight in tiny.start().items()}
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        sgd.step()
        if in_place:
            state = rule.update_(fast, gradients, tiny.slow, state)
        else:
            fast, state = rule(fast, gradients, tiny.slow, state)
        for name, leaf in leaves.items():
            torch.testing.assert_close(fast[name], leaf.detach(), rtol=1e-12, atol=1e-13)


def numbers_of(rule, name):
    """s and rho of the learned rates, beta and c, from the rule's parameters."""
    (rates, decays), _, _ = rule.coefficients()
    keep = 1 / (1 + (-rule.learned("keep_logit", name)).exp())
    return rates[name], decays[name], keep, rule.learned("share", name)


def plain_graph(rule, tiny, state):
    """The first-order meta-loss as a graph of all losses and updates, the g_t detached."""
    fast = {name: home + (tiny.start()[name] - home).detach() for name, home in tiny.slow.items()}
    means = {name: torch.zeros_like(weight) for name, weight in fast.items()}
    total = torch.zeros((), dtype=torch.float64)
    for batch in tiny.batches:
        losses, _, following = tiny.loss({**tiny.rest, **fast}, batch, state)
        total = total + losses.sum()
        state = following.detach()
        found = torch.autograd.grad(losses.sum(), list(fast.values()), retain_graph=True)
        for (name, weight), gradient in zip(list(fast.items()), found, strict=True):
            rate, decay, keep, share = numbers_of(rule, name)
            push = gradient + share * means[name]
            fast[name] = weight - rate * push + decay * (tiny.slow[name] - weight)
            means[name] = keep * means[name] + (1 - keep) * gradient
    return total + sum(weight.square().sum() for weight in fast.values())


@pytest.mark.parametrize("segment", [None, 2])
def test_first_order_against_a_plain_graph(tiny, state, segment):
    rule = shake(Momentum(rates_of(tiny.rms)))
    leaves = [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]
    _, total = run(rule, tiny, state, segment=segment, truncate=True)
    known = plain_graph(rule, tiny, state)
    torch.testing.assert_close(total, known, rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(one, leaves) for one in (total, known))
    for one, two in zip(found, expected, strict=True):
        assert bool(two.any())
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


class Noted(Momentum):
    """Notes the gradients that it is given, or takes those noted before in their place."""

    def __init__(self, rates):
        super().__init__(rates)
        self.given, self.frozen = [], []

    def forward(self, fast, gradients, slow, state, coefficients=None):
        self.given.append(gradients)
        gradients = self.frozen[len(self.given) - 1] if self.frozen else gradients
        return super().forward(fast, gradients, slow, state, coefficients)


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_by_finite_differences(tiny, state, order):
    """First order: of the meta-loss with every g_t, and the loss's states, as they were noted."""
    rule = shake(Noted(rates_of(tiny.rms)))
    _, total = run(rule, tiny, state, order=order)
    names = [name for name, _ in rule.named_parameters()]
    reached = torch.autograd.grad(total, list(rule.parameters()), materialize_grads=True)
    if order == 1:
        noted = list(rule.given)
        states = [
            unroll(
                tiny.loss,
                rule,
                tiny.slow,
                tiny.rest,
                tiny.batches[:number],
                state,
                fast=tiny.start(),
                order=0,
            ).state
            for number in range(1, len(tiny.batches))
        ]
        states, rule.frozen = [state, *states], noted

    def value():
        rule.given.clear()
        if order == 2:
            return run(rule, tiny, state, order=0)[1].item()
        fast, means, total = tiny.start(), None, 0.0
        for number, batch in enumerate(tiny.batches):
            total += tiny.loss({**tiny.rest, **fast}, batch, states[number])[0].sum().item()
            fast, means = rule(fast, rule.frozen[number], tiny.slow, means)
        return total + sum(weight.square().sum().item() for weight in fast.values())

    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter, gradient in zip(names, rule.parameters(), reached, strict=True):
            along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -2, 1):
                parameter.add_(sign * 1e-5 * along)
                values.append(value())
            slope = (values[0] - values[1]) / 2e-5
            assert (gradient * along).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8), name


def test_memory_is_what_it_says(tiny):
    """One number for each of the fast weights; the old state stays as it was."""
    fast = tiny.start()
    rule = shake(Momentum(rates_of(tiny.rms))).requires_grad_(False)
    state = rule.initial_state(fast)
    assert {name: mean.shape for name, mean in state.items()} == {
        name: weight.shape for name, weight in fast.items()
    }
    after = rule.update_(fast, {name: weight.cos() for name, weight in fast.items()}, fast, state)
    assert not any(mean.any() for mean in state.values())
    assert [mean.shape for mean in after.values()] == [mean.shape for mean in state.values()]


def test_every_number_is_saved(tiny):
    source = shake(Momentum(rates_of(tiny.rms)))
    ones = {name: torch.ones_like(rms) for name, rms in tiny.rms.items()}
    target = Momentum(rates_of(ones), keep=0.3)
    target.load_state_dict(source.state_dict())
    fast = tiny.start()
    one, two = (rule(fast, fast, tiny.slow, fast) for rule in (source, target))
    for found, expected in zip(tree.tensors(one), tree.tensors(two), strict=True):
        assert torch.equal(found, expected)


def test_float32_stays_float32(tiny):
    rms = {name: one.float() for name, one in tiny.rms.items()}
    fast = {name: one.float() for name, one in tiny.start().items()}
    slow = {name: one.detach().float() for name, one in tiny.slow.items()}
    new, state = Momentum(rates_of(rms))(fast, fast, slow, None)
    assert {tensor.dtype for tensor in tree.tensors((new, state))} == {torch.float32}


@pytest.mark.parametrize("keep", [0.0, 1.0, float("nan")])
def test_refused_numbers(tiny, keep):
    with pytest.raises(ValueError, match="impossible momentum; expected 0 < keep < 1, found"):
        Momentum(rates_of(tiny.rms), keep=keep)
