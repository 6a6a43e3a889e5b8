"""The contract of update rules: each rule against its equation, coordinate by coordinate in Python.

A new rule joins by a line in RULES: how to build it, and its s and rho at a coordinate.
"""

import itertools
import math

import pytest
import torch

from metalm.meta import cpu_kernels
from metalm.meta.rules import GradientDescent, LearnedRates, RmsDecay

ROWS = 3
SHAPES = {"scale": (), "out.bias": (5,), "in.weight": (4, 3), "filter": (2, 4, 3)}


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
    return (lambda rms: build_learned(rms, **settings), learned_numbers)


RULES = {
    "descent": (
        lambda rms: GradientDescent(0.3),
        lambda rule, rms, name, index: (0.3, 0.0),
    ),
    "descent, decay": (
        lambda rms: GradientDescent(0.3, 0.2),
        lambda rule, rms, name, index: (0.3, 0.2),
    ),
    "rms": (
        lambda rms: RmsDecay(rms, rate=0.07, decay=0.0, eps=0.02),
        lambda rule, rms, name, index: (0.07 / (rms[name][index].item() + 0.02), 0.0),
    ),
    "rms, decay": (
        lambda rms: RmsDecay(rms, rate=0.07, decay=0.6, eps=0.02),
        lambda rule, rms, name, index: (
            0.07 / (rms[name][index].item() + 0.02),
            krause_decay(rms, name, index, 0.6),
        ),
    ),
    "learned as krause": (
        lambda rms: LearnedRates.from_krause(rms, rate=0.07, decay=0.6, eps=0.02),
        lambda rule, rms, name, index: (
            0.07 / (rms[name][index].item() + 0.02),
            krause_decay(rms, name, index, 0.6),
        ),
    ),
    "learned as descent": (
        lambda rms: LearnedRates(rms, rate=0.3, decay=0.2, exponent=0.0),
        lambda rule, rms, name, index: (0.3, 0.2),
    ),
    "learned, no decay": learned(granularity="tensor", rate=0.2, decay=0.0, exponent=0.4),
    **{
        f"learned, {granularity}, {shape}": learned(
            granularity=granularity, rate=0.2, decay=0.4, eps=0.5, decay_shape=shape
        )
        for granularity in ("tensor", "row", "coordinate")
        for shape in ("uniform", "rms")
    },
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


@pytest.mark.parametrize("kind", RULES)
def test_equation_by_coordinate(kind, way, tensors):
    rms, slow, fast, gradients = tensors
    build, numbers = RULES[kind]
    rule = build(rms)
    new, _ = rule(fast, gradients, slow, rule.initial_state(fast))
    for name, shape in SHAPES.items():
        for index in itertools.product(*map(range, shape)):
            rate, decay = numbers(rule, rms, name, index)
            for row in range(ROWS):
                weight = fast[name][row][index].item()
                expected = weight - rate * gradients[name][row][index].item()
                expected += decay * (slow[name][index].item() - weight)
                assert new[name][row][index].item() == pytest.approx(expected, rel=1e-12)


def test_inputs_are_left_alone(rule, tensors):
    _, slow, fast, gradients = tensors
    copies = [{n: t.clone() for n, t in tree.items()} for tree in (fast, gradients, slow)]
    new, _ = rule(fast, gradients, slow, None)
    for tree, copy in zip((fast, gradients, slow), copies, strict=True):
        assert all(torch.equal(tree[name], copy[name]) for name in tree)
    assert all(new[name].data_ptr() != fast[name].data_ptr() for name in fast)


def test_update_in_place_gives_the_same_bits(rule, tensors):
    _, slow, fast, gradients = tensors
    state = rule.initial_state(fast)
    new, _ = rule(fast, gradients, slow, state)
    pointers = {name: tensor.data_ptr() for name, tensor in fast.items()}
    rule.update_(fast, gradients, slow, state)
    for name, tensor in fast.items():
        assert tensor.data_ptr() == pointers[name]
        assert not tensor.requires_grad
        assert torch.equal(tensor, new[name])


def test_rows_do_not_meet(rule, tensors):
    _, slow, fast, gradients = tensors
    new, _ = rule(fast, gradients, slow, rule.initial_state(fast))
    for row in range(ROWS):
        own = {name: tensor[row] for name, tensor in fast.items()}
        alone, _ = rule(own, {n: g[row] for n, g in gradients.items()}, slow, None)
        assert all(torch.equal(alone[name], new[name][row]) for name in own)


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
def test_derivatives_by_finite_differences(rule, tensors, stacked, way):
    _, slow, fast, gradients = tensors
    if not stacked:
        fast, gradients = ({n: t[0] for n, t in tree.items()} for tree in (fast, gradients))
    phi = dict(rule.named_parameters())
    leaves = [*fast.values(), *slow.values(), *phi.values()]
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]

    def outputs(*numbers):
        fast_numbers, slow_numbers = numbers[: len(fast)], numbers[len(fast) : 2 * len(fast)]
        arguments = (
            dict(zip(fast, fast_numbers, strict=True)),
            gradients,
            dict(zip(slow, slow_numbers, strict=True)),
            None,
        )
        replaced = dict(zip(phi, numbers[2 * len(fast) :], strict=True))
        new, _ = torch.func.functional_call(rule, replaced, arguments)
        return tuple(new.values())

    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


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
