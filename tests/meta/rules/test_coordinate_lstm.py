"""What the contract of rules does not say of the coordinatewise LSTM: start, recurrence, memory."""

import math

import pytest
import torch

from metalm.meta import tree
from metalm.meta.rules import CoordinateLSTM, LearnedRates
from metalm.meta.unroll import unroll

KINDS = {"coordinates": {"hidden": 3}, "rows": {"hidden": 4, "coordinates": 6}}


def rates_of(rms, **settings):
    settings = {"rate": 0.02, "decay": 0.2, "exponent": 0.4, "decay_shape": "rms"} | settings
    return LearnedRates(rms, "row", **settings)


def shake(rule, scale=0.3):
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
    return result, result.meta_loss + sum(w.square().sum() for w in result.fast.values())


@pytest.mark.parametrize("decay", [0.2, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_learned_rates(kind, decay, tiny, state):
    """Along a whole unroll, and in every meta-gradient that the learned rates have."""
    plain, rates = (rates_of(tiny.rms, decay=decay) for _ in range(2))
    rule = CoordinateLSTM(rates, **KINDS[kind])
    result, total = run(rule, tiny, state)
    expected, expected_total = run(plain, tiny, state)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-13, atol=0)
    leaves = [*tiny.slow.values(), *tiny.rest.values()]
    found = torch.autograd.grad(total, [*leaves, *rates.parameters()], retain_graph=True)
    known = torch.autograd.grad(expected_total, [*leaves, *plain.parameters()])
    for one, two in zip(found, known, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
    cell = rule.of_coordinates if kind == "coordinates" else rule.of_rows
    assert bool(torch.autograd.grad(total, cell.out)[0].all())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_segments_give_the_same_meta_gradient(kind, tiny, state):
    rule = shake(CoordinateLSTM(rates_of(tiny.rms), **KINDS[kind]))
    leaves = [*tiny.slow.values(), *rule.parameters()]
    found = [
        torch.autograd.grad(
            run(rule, tiny, state, segment=segment)[1], leaves, materialize_grads=True
        )
        for segment in (None, 2)
    ]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def appendix_a(gradient, p=10.0):
    """As the paper writes it, in two cases."""
    if abs(gradient) >= math.exp(-p):
        return math.log(abs(gradient)) / p, math.copysign(1.0, gradient)
    return -1.0, math.exp(p) * gradient


def test_several_steps_against_torch_cells():
    """Gradients of many sizes, zero among them, through torch's LSTM and the paper's two cases."""
    size, num = 5, 7
    rms = torch.full((num,), 0.5, dtype=torch.float64)
    rule = shake(CoordinateLSTM(LearnedRates({"w": rms}, exponent=1.0), hidden=size))
    cell = torch.nn.LSTMCell(3, size).double()
    with torch.no_grad():
        cell.weight_ih.copy_(rule.of_coordinates.weight[:, :3])
        cell.weight_hh.copy_(rule.of_coordinates.weight[:, 3:])
        cell.bias_ih.copy_(rule.of_coordinates.bias)
        cell.bias_hh.zero_()
    sizes = rule.coefficients()
    rate, decay, scale = (kind["w"].detach() for kind in sizes)
    slow = {"w": torch.linspace(-1, 1, num, dtype=torch.float64)}
    fast = weight = slow["w"] + 0.3 * slow["w"].sin()
    state, expected = rule.initial_state({"w": fast}), None
    for step in range(4):
        gradient = torch.tensor([0.0, 1e-9, -1e-5, 3e-5, -0.2, 0.5, 40.0], dtype=torch.float64)
        gradient = gradient.roll(step) * (1 + step)
        (new, state) = rule({"w": fast}, {"w": gradient}, slow, state)
        fast = new["w"]
        away = weight - slow["w"]
        inputs = [appendix_a(y) for y in (gradient / scale).tolist()]
        x = torch.tensor(inputs, dtype=torch.float64)
        x = torch.cat([x, (away / (away.abs() + rate * scale))[:, None]], 1)
        expected = cell(x, expected)
        addition = rate * scale * (expected[0] @ rule.of_coordinates.out[0])
        weight = weight - rate * gradient - decay * away - addition
        torch.testing.assert_close(fast, weight, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state.hidden["w"], expected[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state.cell["w"], expected[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("coordinates", "units"),
    [
        (100, {"embedding": 40, "bias": 9, "filter": 30}),
        (39, {"embedding": 8, "bias": 9, "filter": 30}),
        (0, {"embedding": 8, "bias": 9, "filter": 2}),
    ],
)
def test_memory_is_what_it_says(coordinates, units):
    shapes = {"embedding": (8, 5), "bias": (9,), "filter": (2, 3, 5)}
    rule = CoordinateLSTM(
        rates_of({name: torch.ones(shape) for name, shape in shapes.items()}),
        hidden=6,
        coordinates=coordinates,
    )
    assert rule.units() == units
    fast = {name: torch.zeros(3, *shape) for name, shape in shapes.items()}
    state = rule.initial_state(fast)
    assert sum(tensor.numel() for tensor in tree.tensors(state)) == 3 * rule.state_size()
    assert rule.state_size() == 2 * 6 * sum(units.values())
    _, state = rule(fast, fast, {name: weight[0] for name, weight in fast.items()}, state)
    assert sum(tensor.numel() for tensor in tree.tensors(state)) == 3 * rule.state_size()


def test_every_number_is_saved(tiny):
    source = shake(CoordinateLSTM(rates_of(tiny.rms), hidden=3))
    ones = {name: torch.ones_like(rms) for name, rms in tiny.rms.items()}
    target = CoordinateLSTM(rates_of(ones), hidden=3, seed=9)
    target.load_state_dict(source.state_dict())
    fast = tiny.start()
    one, two = (rule(fast, fast, tiny.slow, None)[0] for rule in (source, target))
    assert all(torch.equal(one[name], two[name]) for name in fast)


def test_float32_stays_float32(tiny):
    rms = {name: one.float() for name, one in tiny.rms.items()}
    fast = {name: one.float() for name, one in tiny.start().items()}
    slow = {name: one.detach().float() for name, one in tiny.slow.items()}
    new, state = CoordinateLSTM(rates_of(rms))(fast, fast, slow, None)
    assert {tensor.dtype for tensor in tree.tensors((new, state))} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "impossible LSTM; expected >= 1 units, found 0"),
        ({"coordinates": -1}, "impossible size; expected >= 0 coordinates, found -1"),
    ],
)
def test_refused_settings(settings, message, tiny):
    with pytest.raises(ValueError, match=message):
        CoordinateLSTM(rates_of(tiny.rms), **settings)
