"""The contract of update rules: each rule against its equation, coordinate by coordinate in Python.

A new rule joins by a line in RULES: how to build it, and where its first step takes a coordinate.
Rules with a state are also held to what the reading asks of it: rows that come first and do not
meet, and a reading that goes on from a saved state as if it had never stopped.
"""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch

from metalm.meta import tree
from metalm.meta.kernels import cpu_kernels
from metalm.meta.rules import (
    Adam,
    CoordinateLSTM,
    CoordinateRates,
    Gated,
    GradientDescent,
    LearnedRates,
    Momentum,
    RmsDecay,
)
from metalm.meta.rules.meta_lstm import MetaLSTM
from metalm.training.state import pack, unpack

ROWS = 3
SHAPES = {"scale": (), "out.bias": (5,), "in.weight": (4, 3), "filter": (2, 4, 3)}


class Place(NamedTuple):
    """A coordinate of a row, all that its step may depend on, in a first step."""

    rule: Any
    rms: dict
    name: str
    index: tuple
    row: int
    fast: dict
    gradients: dict
    slow: dict
    losses: Any

    def at(self, tensors):
        tensor = tensors[self.name]
        return tensor[self.index if tensor.dim() == len(self.index) else (self.row, *self.index)]

    @property
    def weight(self):
        return self.at(self.fast).item()

    @property
    def gradient(self):
        return self.at(self.gradients).item()

    @property
    def home(self):
        return self.at(self.slow).item()


def stepped(numbers):
    """A rule that has s and rho at a coordinate."""

    def move(place):
        rate, decay = numbers(place.rule, place.rms, place.name, place.index)
        return place.weight - rate * place.gradient + decay * (place.home - place.weight)

    return move


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def gsum(rms):
    return mean(mean(tensor.flatten().tolist()) for tensor in rms.values())


def krause_decay(rms, name, index, decay):
    return min(1.0, decay * rms[name][index].item() / gsum(rms))


def learned_numbers(rule, rms, name, index):
    """s and rho of LearnedRates at a coordinate, from its parameters, in plain arithmetic."""

    def own(kind):
        tensor = rule.learned(kind, name)
        if rule.granularity == "coordinate":
            return tensor[index].item()
        if rule.granularity == "row" and index:
            return tensor[index[0]].item()
        return tensor.item()

    value = rms[name][index].item()
    eps = math.exp(rule.learned("log_eps", name).item()) * mean(rms[name].flatten().tolist())
    power = (value + eps) ** -rule.learned("exponent", name).item()
    rate = rule.rate_scale.item() * math.exp(own("log_rate")) * power
    if not rule.has_decay:
        return rate, 0.0
    decay = rule.decay_scale.item() / (1 + math.exp(-own("decay_logit")))
    if rule.decay_shape == "rms":
        decay *= value / gsum(rms)
    return rate, min(1.0, decay)


def build_learned(rms, **settings):
    rule = LearnedRates(rms, **settings)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        rule.rate_scale.fill_(1.7)
        rule.decay_scale.fill_(0.6)
        for parameter in rule.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return rule


def learned(**settings):
    return (lambda rms: build_learned(rms, **settings), stepped(learned_numbers))


def build_on_rates(rule_of, rms, **settings):
    """A rule on top of learned rates, all of its numbers away from where they start."""
    rule = rule_of(build_learned(rms, granularity="row", rate=0.2, decay=0.3), **settings)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for name, parameter in rule.named_parameters():
            if not name.startswith("rates."):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.5 * noise)
    return rule


def sigmoid(number):
    return 1 / (1 + math.exp(-number))


def rates_at(place):
    """s, rho and RMS + eps of the learned rates under a rule."""
    rates = place.rule.rates
    rate, decay = learned_numbers(rates, place.rms, place.name, place.index)
    relative = math.exp(rates.learned("log_eps", place.name).item())
    eps = relative * mean(place.rms[place.name].flatten().tolist())
    return rate, decay, place.rms[place.name][place.index].item() + eps


def gated_move(place):
    rule = place.rule
    rate, decay, scale = rates_at(place)
    push = place.gradient / (abs(place.gradient) + scale)
    away = place.weight - place.home
    pull = away / (abs(away) + rate * scale)
    features = {
        "gradient": abs(push),
        "weight": abs(place.weight) / (abs(place.weight) + rate * scale),
        "distance": abs(pull),
        "homeward": push * pull,
        "rms": scale / (scale + gsum(place.rms)),
        "loss": math.copysign(math.log(1 + abs(loss := place.losses[place.row].item())), loss),
        "surprise": 0.0,
        "drift": 0.0,
        "position": 0.0,
    }
    units = []
    for unit in range(rule.hidden or 2):
        terms = [rule.bias[unit].item()]
        for names, matrix in ((rule.sees, rule.from_coordinate), (rule.sees_of_row, rule.from_row)):
            terms += [matrix[unit, i].item() * features[name] for i, name in enumerate(names)]
        units.append(sum(terms))
    if rule.hidden:
        units = [
            sum(rule.out[gate, i].item() * math.tanh(unit) for i, unit in enumerate(units))
            for gate in range(2)
        ]
    update = 2 * sigmoid(units[0])
    flush = sigmoid(math.log(decay / (1 - decay)) + units[1])
    copy = 1 - flush
    return copy * place.weight + flush * place.home - update * rate * place.gradient


def gated(**settings):
    return (lambda rms: build_on_rates(Gated, rms, **settings), gated_move)


def lstm_by_hand(cell, inputs):
    """Hidden units after one step from a state of zeros."""
    size = cell.out.shape[1]
    gates = [
        sum(cell.weight[gate, i].item() * x for i, x in enumerate(inputs)) + cell.bias[gate].item()
        for gate in range(4 * size)
    ]
    cells = [sigmoid(gates[i]) * math.tanh(gates[2 * size + i]) for i in range(size)]
    hidden = [sigmoid(gates[3 * size + i]) * math.tanh(cells[i]) for i in range(size)]
    return [sum(row[i].item() * hidden[i] for i in range(size)) for row in cell.out]


def lstm_move(place):
    def seen(index):
        rate, decay, scale = rates_at(place._replace(index=index))
        other = place._replace(index=index)
        y, away = other.gradient / scale, other.weight - other.home
        pull = away / (abs(away) + rate * scale)
        push = other.gradient / (abs(other.gradient) + scale)
        logarithm = math.log(max(abs(y), math.exp(-10))) / 10
        sign = max(-1.0, min(1.0, math.exp(10) * y))
        return rate, decay, scale, logarithm, sign, pull, push

    rate, decay, scale, logarithm, sign, pull, _ = seen(place.index)
    shape = SHAPES[place.name]
    if len(shape) < 2 or math.prod(shape) <= place.rule.coordinates:
        (addition,) = lstm_by_hand(place.rule.of_coordinates, [logarithm, sign, pull])
        moved = place.weight - rate * place.gradient + decay * (place.home - place.weight)
        return moved - rate * scale * addition
    row = itertools.product(place.index[:1], *map(range, shape[1:]))
    all_seen = [seen(index) for index in row]
    means = [
        mean(numbers[3] for numbers in all_seen),
        mean(abs(numbers[5]) for numbers in all_seen),
        mean(numbers[5] * numbers[6] for numbers in all_seen),
    ]
    update, flush = lstm_by_hand(place.rule.of_rows, means)
    moved = place.weight - rate * (1 + update) * place.gradient
    return moved + (decay + flush) * (place.home - place.weight)


def lstm(**settings):
    return (lambda rms: build_on_rates(CoordinateLSTM, rms, **settings), lstm_move)


def momentum_move(place):
    """A first step: there is no earlier gradient."""
    rate, decay, _ = rates_at(place)
    return place.weight - rate * place.gradient + decay * (place.home - place.weight)


def build_shaken(rule, size):
    """A rule whose numbers are away from where they start."""
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in rule.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(size * noise)
    return rule


def adam_move(place):
    """A first step: both means hold nothing but this gradient, and are scaled back to it."""
    return place.weight - 0.3 * place.gradient / (abs(place.gradient) + 0.02)


def meta_lstm_move(place):
    """A first step: hidden units, cells and gates before it are zero."""
    rule, units = place.rule, place.rule.hidden
    inputs = [*log_and_sign(place.losses[place.row].item()), *log_and_sign(place.gradient)]
    gates = [
        sum(rule.into[gate, i].item() * x for i, x in enumerate(inputs)) + rule.bias[gate].item()
        for gate in range(4 * units)
    ]
    cells = [sigmoid(gates[i]) * math.tanh(gates[2 * units + i]) for i in range(units)]
    hidden = [sigmoid(gates[3 * units + i]) * math.tanh(cells[i]) for i in range(units)]

    def gate(weight, bias):
        seen = [*hidden, place.weight]
        return sigmoid(sum(weight[i].item() * x for i, x in enumerate(seen)) + bias.item())

    forget = gate(rule.forget_weight, rule.forget_bias)
    return forget * place.weight - gate(rule.enter_weight, rule.enter_bias) * place.gradient


def log_and_sign(x):
    """Size and sign as Ravi and Larochelle show them to the LSTM (appendix A, p = 10)."""
    if abs(x) >= math.exp(-10):
        return math.log(abs(x)) / 10, math.copysign(1.0, x)
    return -1.0, math.exp(10) * x


RULES = {
    "descent": (
        lambda rms: GradientDescent(0.3),
        stepped(lambda rule, rms, name, index: (0.3, 0.0)),
    ),
    "descent, decay": (
        lambda rms: GradientDescent(0.3, 0.2),
        stepped(lambda rule, rms, name, index: (0.3, 0.2)),
    ),
    "rms": (
        lambda rms: RmsDecay(rms, rate=0.07, decay=0.0, eps=0.02),
        stepped(lambda rule, rms, name, index: (0.07 / (rms[name][index].item() + 0.02), 0.0)),
    ),
    "rms, decay": (
        lambda rms: RmsDecay(rms, rate=0.07, decay=0.6, eps=0.02),
        stepped(
            lambda rule, rms, name, index: (
                0.07 / (rms[name][index].item() + 0.02),
                krause_decay(rms, name, index, 0.6),
            )
        ),
    ),
    "learned as krause": (
        lambda rms: LearnedRates.from_krause(rms, rate=0.07, decay=0.6, eps=0.02),
        stepped(
            lambda rule, rms, name, index: (
                0.07 / (rms[name][index].item() + 0.02),
                krause_decay(rms, name, index, 0.6),
            )
        ),
    ),
    "learned as descent": (
        lambda rms: LearnedRates(rms, rate=0.3, decay=0.2, exponent=0.0),
        stepped(lambda rule, rms, name, index: (0.3, 0.2)),
    ),
    "learned, no decay": learned(granularity="tensor", rate=0.2, decay=0.0, exponent=0.4),
    **{
        f"learned, {granularity}, {shape}": learned(
            granularity=granularity, rate=0.2, decay=0.4, eps=0.5, decay_shape=shape
        )
        for granularity in ("tensor", "row", "coordinate")
        for shape in ("uniform", "rms")
    },
    "gated": gated(),
    "gated, hidden": gated(hidden=4),
    "gated by the row alone": gated(sees=("loss", "position")),
    "gated by the coordinate alone": gated(sees=("distance", "gradient", "homeward"), hidden=3),
    "LSTM of coordinates": lstm(hidden=3),
    "LSTM of rows": lstm(hidden=4, coordinates=13),
    "momentum": (lambda rms: build_on_rates(Momentum, rms), momentum_move),
    "rates of coordinates": (
        lambda rms: build_shaken(CoordinateRates(rms, 0.2), 0.3),
        stepped(lambda rule, rms, name, index: (rule.coefficients().rates[name][index].item(), 0)),
    ),
    "Adam": (lambda rms: Adam(0.3, (0.7, 0.9), 0.02), adam_move),
    "LSTM meta-learner": (lambda rms: build_shaken(MetaLSTM(rms, hidden=3), 0.5), meta_lstm_move),
}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(7)

    def normal(rows):
        return {
            name: torch.randn((*rows, *shape), generator=generator, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }

    rms = {name: tensor.abs() for name, tensor in normal(()).items()}
    return rms, normal(()), normal((ROWS,)), normal((ROWS,))


@pytest.fixture(params=RULES)
def rule(request, tensors):
    return RULES[request.param][0](tensors[0])


@pytest.fixture(params=["on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """The kernels, of which tensors on a CPU would take one kind."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(cpu_kernels, "fits", lambda tensor: False)


@pytest.fixture
def losses():
    return torch.tensor([0.7, -1.9, 5.2], dtype=torch.float64)


@pytest.mark.parametrize("kind", RULES)
def test_equation_by_coordinate(kind, way, tensors, losses):
    rms, slow, fast, gradients = tensors
    build, move = RULES[kind]
    rule = build(rms)
    new, _ = rule(fast, gradients, slow, rule.observe(rule.initial_state(fast), losses))
    for name, shape in SHAPES.items():
        for index in itertools.product(*map(range, shape)):
            for row in range(ROWS):
                place = Place(rule, rms, name, index, row, fast, gradients, slow, losses)
                expected = move(place)
                assert new[name][row][index].item() == pytest.approx(expected, rel=1e-12)


def several_steps(rule, tensors, losses, state=None, count=3, first=0):
    """Steps that go on from each other, with other gradients and losses each time."""
    _, slow, fast, gradients = tensors
    state = rule.initial_state(fast) if state is None else state
    for step in range(first, first + count):
        pushed = {name: (0.5 + step) * tensor for name, tensor in gradients.items()}
        state = rule.observe(state, losses * (1 + step % 2))
        fast, state = rule(fast, pushed, slow, state)
    return fast, state


def test_inputs_are_left_alone(rule, tensors, losses):
    _, slow, fast, gradients = tensors
    _, state = several_steps(rule, tensors, losses)
    inputs = (fast, gradients, slow, state)
    copies = tree.transform(inputs, torch.clone)
    new, _ = rule(*inputs)
    for one, copy in zip(tree.tensors(inputs), tree.tensors(copies), strict=True):
        assert torch.equal(one, copy)
    assert all(new[name].data_ptr() != fast[name].data_ptr() for name in fast)


def test_update_in_place_gives_the_same_bits(rule, tensors, losses):
    _, slow, fast, gradients = tensors
    _, state = several_steps(rule, tensors, losses)
    new, following = rule(fast, gradients, slow, state)
    pointers = {name: tensor.data_ptr() for name, tensor in fast.items()}
    found = rule.update_(fast, gradients, slow, state)
    for name, tensor in fast.items():
        assert tensor.data_ptr() == pointers[name]
        assert not tensor.requires_grad
        assert torch.equal(tensor, new[name])
    for one, two in zip(tree.tensors(found), tree.tensors(following), strict=True):
        assert not one.requires_grad
        assert torch.equal(one, two)


def test_update_in_place_of_weights_that_lie_otherwise_in_memory(rule, tensors):
    _, slow, fast, gradients = tensors
    new, _ = rule(fast, gradients, slow, None)
    other = {
        name: tensor.mT.contiguous().mT if tensor.dim() > 2 else tensor
        for name, tensor in fast.items()
    }
    assert not other["in.weight"].is_contiguous()
    rule.update_(other, gradients, slow, None)
    for name, tensor in other.items():
        torch.testing.assert_close(tensor, new[name].detach(), rtol=1e-12, atol=0)


def test_rows_do_not_meet(rule, tensors, losses):
    _, slow, fast, gradients = tensors
    new, state = several_steps(rule, tensors, losses)
    for row in range(ROWS):
        own = ({n: t[row] for n, t in some.items()} for some in (fast, gradients))
        alone, own_state = several_steps(rule, (None, slow, *own), losses[row])
        for name in alone:
            torch.testing.assert_close(alone[name], new[name][row], rtol=1e-13, atol=1e-15)
        for one, two in zip(tree.tensors(own_state), tree.tensors(state), strict=True):
            torch.testing.assert_close(one, two[row], rtol=1e-13, atol=1e-15)


def test_a_new_row_starts_like_any_other(rule, tensors):
    _, _, fast, _ = tensors
    whole = tree.tensors(rule.initial_state(fast))
    one = tree.tensors(rule.initial_state({name: tensor[1:2] for name, tensor in fast.items()}))
    for every, new in zip(whole, one, strict=True):
        assert every.shape == (ROWS, *new.shape[1:])
        assert torch.equal(every[1:2], new)


def test_reading_goes_on_from_a_saved_state(rule, tensors, losses):
    rms, slow, fast, gradients = tensors
    unbroken = several_steps(rule, tensors, losses, count=5)
    fast, state = several_steps(rule, tensors, losses, count=2)
    fast, state = unpack(*pack((fast, state)))
    resumed = several_steps(rule, (rms, slow, fast, gradients), losses, state, 3, first=2)
    for one, two in zip(tree.tensors(unbroken), tree.tensors(resumed), strict=True):
        assert torch.equal(one, two)


def test_handed_over_coefficients_change_nothing(rule, tensors):
    _, slow, fast, gradients = tensors
    new, _ = rule(fast, gradients, slow, None)
    handed, _ = rule(fast, gradients, slow, None, rule.coefficients())
    assert all(torch.equal(new[name], handed[name]) for name in new)


@pytest.mark.parametrize(
    ("way", "stacked"),
    [("on a CPU", True), ("on a CPU", False), ("as on a GPU", True)],
    indirect=["way"],
)
def test_derivatives_by_finite_differences(rule, tensors, losses, stacked, way):
    """Of a second step, so that the state counts too, to W, g, W_0, phi and the state."""
    _, slow, fast, gradients = tensors
    if not stacked:
        fast, gradients = ({n: t[0] for n, t in some.items()} for some in (fast, gradients))
        losses = losses[0]
    state = several_steps(rule, (None, slow, fast, gradients), losses, count=1)[1]
    state = rule.observe(state, losses * 2)
    own = (fast, gradients, slow, dict(rule.named_parameters()), state)
    inputs = [leaf.detach().clone().requires_grad_() for leaf in tree.tensors(own)]
    generator = torch.Generator().manual_seed(6)

    def directions(tensors):
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]

    def outputs(numbers):
        fast, gradients, slow, phi, state = tree.replace(own, list(numbers))
        new, following = torch.func.functional_call(rule, phi, (fast, gradients, slow, state))
        return tree.tensors((new, following))

    found = outputs(inputs)
    weights = [
        one if new.requires_grad else torch.zeros_like(one)
        for one, new in zip(directions(found), found, strict=True)
    ]

    def weighted(tensors):
        return sum((one * two).sum() for one, two in zip(tensors, weights, strict=True))

    reached = torch.autograd.grad(weighted(found), inputs, materialize_grads=True)
    # Shares of the numbers: means of squares, of which Adam takes the root, stay positive.
    shares = [torch.where(leaf == 0, 1, leaf.detach().abs().clamp(max=1)) for leaf in inputs]
    step, along = 1e-6, [d * share for d, share in zip(directions(inputs), shares, strict=True)]
    sizes = [len(tree.tensors(kind)) for kind in own]
    for last, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        values = []
        for sign in (1, -1):
            moved = [leaf.detach() for leaf in inputs]
            for index in range(last - size, last):
                moved[index] = moved[index] + sign * step * along[index]
            with torch.no_grad():
                values.append(weighted(outputs(moved)).item())
        slope = (values[0] - values[1]) / (2 * step)
        expected = sum((reached[i] * along[i]).sum().item() for i in range(last - size, last))
        assert expected == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_numbers_follow_the_dtype_of_the_weights():
    fast = {"w": torch.randn(2, 3)}
    slow = {"w": torch.randn(3)}
    rule = GradientDescent(0.25, 0.5)
    new, _ = rule(fast, {"w": torch.ones(2, 3)}, slow, None)
    assert new["w"].dtype == torch.float32
    torch.testing.assert_close(new["w"], fast["w"] / 2 + slow["w"] / 2 - 0.25)


def test_every_learned_number_is_saved(tensors):
    rms = tensors[0]
    source = build_learned(rms, granularity="row", decay_shape="rms")
    target = LearnedRates(rms, granularity="row", decay_shape="rms")
    target.load_state_dict(source.state_dict())
    one, two = source.coefficients(), target.coefficients()
    assert all(torch.equal(one.rates[name], two.rates[name]) for name in rms)
    assert all(torch.equal(one.decays[name], two.decays[name]) for name in rms)


def test_a_tensor_without_gradients_has_finite_rates():
    rms = {"used": torch.tensor([0.5, 1.5]), "unused": torch.zeros(3)}
    rates = LearnedRates(rms, rate=1.0, exponent=1.0, eps=1.0).coefficients().rates
    torch.testing.assert_close(rates["unused"], torch.full((3,), 1 / 0.5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rms: GradientDescent(-0.1), "impossible rate; expected >= 0, found -0.1"),
        (lambda rms: GradientDescent(math.nan), "impossible rate"),
        (lambda rms: GradientDescent(0.1, 1.5), "impossible decay; expected 0 to 1, found 1.5"),
        (lambda rms: RmsDecay(rms, 0.1, -1.0, 0.1), "impossible decay"),
        (lambda rms: RmsDecay({"w": torch.zeros(2) + 1, "v": torch.zeros(2)}, 1, 1, 0), "'v'"),
        (lambda rms: RmsDecay({"w": torch.tensor([math.nan])}, 1, 1, 1), "bad gradient stat"),
        (lambda rms: RmsDecay({"w": torch.zeros(2)}, 1, 1, 1), "all zero"),
        (lambda rms: LearnedRates(rms, "column"), "unknown granularity"),
        (lambda rms: LearnedRates(rms, decay_shape="square"), "unknown decay shape"),
        (lambda rms: LearnedRates(rms, rate=0.0), "impossible rate"),
        (lambda rms: LearnedRates(rms, eps=0.0), "impossible eps"),
        (lambda rms: LearnedRates(rms, decay=1.0), "impossible decay"),
        (lambda rms: LearnedRates.from_krause(rms, 0.1, 0.1, 0.0), "impossible eps"),
    ],
)
def test_refused_numbers(build, message, tensors):
    with pytest.raises(ValueError, match=message):
        build(tensors[0])
