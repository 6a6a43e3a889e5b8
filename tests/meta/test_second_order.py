"""Second order: finite differences of the whole meta-loss, plain double backward, closed forms."""

import pytest
import torch

from metalm.meta.kernels import cpu_kernels
from metalm.meta.rules import (
    CoordinateLSTM,
    Gated,
    GradientDescent,
    LearnedRates,
    Momentum,
    RmsDecay,
)
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule


class Surprised(AbstractUpdateRule):
    """V <- beta V + g, W <- W - r l V + rho (W_0 - W): a state that holds tensors and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.02, dtype=torch.float64))
        self.beta = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def initial_state(self, fast):
        rows = next(iter(fast.values())).shape[0]
        velocity = {name: torch.zeros(w.shape, dtype=w.dtype) for name, w in fast.items()}
        return {"velocity": velocity, "loss": torch.zeros(rows).double(), "steps": torch.tensor(0)}

    def observe(self, state, losses, aux=None):
        return state | {"loss": losses}

    def forward(self, fast, gradients, slow, state, coefficients=None):
        velocity = {n: self.beta * v + gradients[n] for n, v in state["velocity"].items()}
        rate = {n: self.rate * state["loss"].reshape(-1, *(1,) * w.dim()) for n, w in slow.items()}
        new = {
            name: weight - rate[name] * velocity[name] + 0.1 * (slow[name] - weight)
            for name, weight in fast.items()
        }
        return new, state | {"velocity": velocity, "steps": state["steps"] + 1}


RULES = {
    "descent": lambda tiny: GradientDescent(0.03),
    "rms": lambda tiny: RmsDecay(tiny.rms, 0.01, 0.3, 0.1),
    "tensor": lambda tiny: LearnedRates(tiny.rms, "tensor", 0.05, 0.2, 0.4, 1.0, "rms"),
    "coordinate": lambda tiny: LearnedRates(tiny.rms, "coordinate", 0.05, 0.2, 0.4),
    "state": lambda tiny: Surprised(),
    "gated": lambda tiny: moved(Gated(learned(tiny))),
    "gated-hidden": lambda tiny: moved(Gated(learned(tiny), hidden=3)),
    # Of some tensors the coordinates have states, of others the rows.
    "lstm": lambda tiny: moved(CoordinateLSTM(learned(tiny), hidden=2, coordinates=5)),
    "momentum": lambda tiny: moved(Momentum(learned(tiny))),
}


KINKED = {"gated", "gated-hidden", "lstm"}


def learned(tiny):
    return LearnedRates(tiny.rms, "tensor", 0.05, 0.2, 0.4)


def moved(rule):
    """Away from where it begins, at which networks have no part."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return rule


def leaves_of(tiny, rule):
    return [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]


def slope_along(leaf, direction, function, step=1e-5):
    """Central difference of fourth order."""
    values = []
    for times in (1, -1, 2, -2):
        with torch.no_grad():
            leaf.add_(times * step * direction)
            values.append(function())
            leaf.sub_(times * step * direction)
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)


@pytest.mark.parametrize("segment", [None, 2], ids=["whole", "segments"])
@pytest.mark.parametrize("start", ["slow", "displaced"])
@pytest.mark.parametrize("kind", RULES)
def test_finite_differences_of_the_whole_meta_loss(kind, start, segment, tiny, state):
    """The meta-loss is that of the plain reading: inner gradients and states move along."""
    rule, weights = RULES[kind](tiny), [1.0, 0.0, 2.0, 1.0, 0.5]
    away = {n: w - tiny.slow[n].detach() for n, w in tiny.start().items()}
    if start == "slow":
        away = {n: torch.zeros_like(w) for n, w in away.items()}

    def read(**options):
        fast = {name: (tiny.slow[name] + away[name]).detach() for name in away}
        return unroll(
            tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state,
            fast=fast, truncate=True, weights=weights, **options,
        ).meta_loss  # fmt: skip

    exact = read(order=2, segment=segment)
    leaves = leaves_of(tiny, rule)
    gradients = torch.autograd.grad(exact, leaves)
    first = torch.autograd.grad(read(order=1), leaves)
    generator = torch.Generator().manual_seed(2)
    # What gates and the LSTM see has kinks, which a long step would cross.
    step, error = (1e-5, 2e-7) if kind in KINKED else (1e-3, 1e-9)
    for leaf, gradient, wrong in zip(leaves, gradients, first, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        slope = slope_along(leaf, direction, lambda: read(order=0).item(), step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-7, abs=error)
        assert (wrong * direction).sum().item() != pytest.approx(slope, rel=1e-4)


def plain_unroll(tiny, rule, state):
    """Independent: one graph through losses, inner gradients and updates, nothing detached."""
    fast = {name: w.expand(tiny.rows, *w.shape) for name, w in tiny.slow.items()}
    rule_state, total = rule.initial_state(fast), 0.0
    for batch in tiny.batches:
        fast = {name: weight.clone() for name, weight in fast.items()}
        losses, _, state = tiny.loss({**fast, **tiny.rest}, batch, state)
        total = total + losses.sum()
        gradients = torch.autograd.grad(losses.sum(), list(fast.values()), create_graph=True)
        rule_state = rule.observe(rule_state, losses)
        fast, rule_state = rule(
            fast, dict(zip(fast, gradients, strict=True)), tiny.slow, rule_state
        )
    return total, fast


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "as on a GPU"])
@pytest.mark.parametrize("segment", [None, 1, 2, 9, "auto", "least"])
@pytest.mark.parametrize("kind", RULES)
def test_against_a_plain_double_backward_graph(kind, segment, whole, tiny, state, monkeypatch):
    if whole:
        monkeypatch.setattr(cpu_kernels, "fits", lambda tensor: False)
    rule = RULES[kind](tiny)
    leaves = leaves_of(tiny, rule)
    result = unroll(
        tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state,
        rows=tiny.rows, order=2, segment=segment,
    )  # fmt: skip
    total, fast = plain_unroll(tiny, rule, state)
    torch.testing.assert_close(result.meta_loss, total)
    # The last fast weights count too; their gradient goes through the last inner gradient.
    got, expected = (
        torch.autograd.grad(0.3 * j + sum(w.square().sum() for w in last.values()), leaves)
        for j, last in ((result.meta_loss, result.fast), (total, fast))
    )
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert not result.state.requires_grad
    assert not result.losses.requires_grad
    assert not any(aux.requires_grad for aux in result.aux)


@pytest.mark.parametrize("segment", [None, 3])
def test_nothing_but_phi_is_learned(segment, tiny, state):
    """Frozen slow weights and rest: the first inner gradient depends on nothing."""
    rule = RULES["tensor"](tiny)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state)
    options = {"rows": tiny.rows, "order": 2, "segment": segment}
    phi = list(rule.parameters())
    free = torch.autograd.grad(unroll(*arguments, **options).meta_loss, phi)
    for tensor in (*tiny.slow.values(), *tiny.rest.values()):
        tensor.requires_grad_(False)
    frozen = torch.autograd.grad(unroll(*arguments, **options).meta_loss, phi)
    for one, two in zip(free, frozen, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_nothing_at_all_is_learned(tiny, state):
    for tensor in (*tiny.slow.values(), *tiny.rest.values()):
        tensor.requires_grad_(False)
    arguments = (tiny.loss, GradientDescent(0.1), tiny.slow, tiny.rest, tiny.batches, state)
    result = unroll(*arguments, rows=tiny.rows, order=2)
    plain = unroll(*arguments, rows=tiny.rows, order=0)
    assert torch.equal(result.losses, plain.losses)


def quadratic(parameters, batch, state):
    """0.5 (t - a)^T A (t - a)."""
    matrix, centre = batch
    away = parameters["t"] - centre
    return 0.5 * away @ matrix @ away, None, state


@pytest.mark.parametrize("segment", [None, 2])
def test_quadratic_closed_forms(segment):
    """To t_0: P_k (t_k - b); to the rate: -k (A P_{k-1} (t_0 - a)) . (t_k - b); P = (I - r A)^k."""
    rate, steps = 0.1, 4
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    first, inner, outer = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    matrix, unit = root @ root.T / 5, torch.eye(5, dtype=torch.float64)
    slow = {"t": first.clone().requires_grad_()}
    rule = LearnedRates({"t": torch.ones(5).double()}, rate=rate, decay=0.0, exponent=0.0)
    batches = [*[(matrix, inner)] * steps, (unit, outer)]
    result = unroll(
        quadratic, rule, slow, {}, batches, None,
        weights=[0.0] * steps + [1.0], order=2, segment=segment,
    )  # fmt: skip
    result.meta_loss.backward()
    power = torch.linalg.matrix_power(unit - rate * matrix, steps - 1)
    last = inner + (unit - rate * matrix) @ power @ (first - inner)
    torch.testing.assert_close(slow["t"].grad, (unit - rate * matrix) @ power @ (last - outer))
    slope = -steps * (matrix @ power @ (first - inner)) @ (last - outer)
    torch.testing.assert_close(rule.learned("log_rate", "t").grad, rate * slope)


def test_a_weight_that_the_loss_ignores(tiny, state):
    idle = torch.ones(3, dtype=torch.float64, requires_grad=True)
    slow = {**tiny.slow, "idle": idle}
    result = unroll(
        tiny.loss, GradientDescent(0.03, 0.5), slow, tiny.rest, tiny.batches, state,
        rows=tiny.rows, order=2,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.fast["idle"].sum(), idle)
    torch.testing.assert_close(gradient, torch.full((3,), 3.0, dtype=torch.float64))
