"""The compiled step of linear gates against the same in tensor operations and autograd."""

import math

import numpy as np
import pytest
import torch

from metalm.meta.kernels import cpu_kernels
from metalm.meta.rules import Gated, LearnedRates, gate_kernels

# More than two blocks, a tensor with one block, and a scalar.
SHAPES = {"table": (71, 131), "vector": (13,), "scale": ()}


def problem(dtype, rows, **settings):
    generator = torch.Generator().manual_seed(9)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rms = {name: normal(*shape).abs() + 0.05 for name, shape in SHAPES.items()}
    rule = Gated(LearnedRates(rms, "row", rate=0.3, decay=0.2, exponent=0.6), **settings)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.add_(0.7 * normal(*parameter.shape))
    slow = {name: normal(*shape).to(dtype) for name, shape in SHAPES.items()}
    fast = {
        name: weight + 0.4 * normal(rows, *weight.shape).to(dtype) for name, weight in slow.items()
    }
    gradients = {name: normal(*weight.shape).to(dtype) for name, weight in fast.items()}
    return rule.to(dtype), slow, fast, gradients, normal(rows).to(dtype)


def derivatives(rule, slow, fast, gradients, losses):
    """The step, the gates, and what a weighted sum of the step gives to all of its numbers."""
    leaves = [*slow.values(), *fast.values(), *gradients.values(), *rule.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    new, state = rule(fast, gradients, slow, rule.observe(rule.initial_state(fast), losses))
    total = sum((weight * weight.detach().cos()).sum() for weight in new.values())
    reached = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [weight.detach() for weight in new.values()], state["gates"], reached


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sees", [None, ("distance", "rms", "loss"), ("loss",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_like_tensor_operations_forth_and_back(dtype, sees, rows, monkeypatch):
    settings = {} if sees is None else {"sees": sees}
    compiled = derivatives(*problem(dtype, rows, **settings))
    monkeypatch.setattr(gate_kernels, "fits", lambda step: False)
    plain = derivatives(*problem(dtype, rows, **settings))
    rtol, atol = (2e-4, 2e-4) if dtype == torch.float32 else (1e-10, 1e-11)
    for one, two in zip(compiled[0], plain[0], strict=True):
        torch.testing.assert_close(one, two, rtol=rtol / 10, atol=atol / 10)
    torch.testing.assert_close(compiled[1], plain[1], rtol=rtol, atol=atol)
    for one, two in zip(compiled[2], plain[2], strict=True):
        largest = max(two.abs().flatten().tolist(), default=0.0)
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol * largest)


def test_one_row_many_times_is_like_copies_of_it():
    rule, slow, _, gradients, losses = problem(torch.float64, 3)
    shared = {name: weight.expand(3, *weight.shape) for name, weight in slow.items()}
    copies = {name: weight.clone() for name, weight in shared.items()}
    found = derivatives(rule, slow, copies, gradients, losses)
    state = rule.observe(rule.initial_state(shared), losses)
    new, _ = rule(shared, gradients, slow, state)
    assert all(torch.equal(one, two) for one, two in zip(new.values(), found[0], strict=True))


def test_bits_do_not_depend_on_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = derivatives(*problem(torch.float32, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    three = derivatives(*problem(torch.float32, 2))
    for alone, shared in zip(
        (*one[0], one[1], *one[2]), (*three[0], three[1], *three[2]), strict=True
    ):
        assert torch.equal(alone, shared)


@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_the_exponential(dtype, within):
    constants = np.array([0, 1, 30, 0, 0, *gate_kernels._EXPONENTIAL]).astype(dtype)
    for z in np.linspace(-30, 30, 41).astype(dtype):
        found = float(gate_kernels._exponential(z, constants))
        assert found == pytest.approx(math.exp(float(z)), rel=within)
    assert gate_kernels._exponential(dtype(0), constants) == 1


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_gates_beyond_the_largest_do_not_learn(bias, monkeypatch):
    """As a clamp has it: the gate stays, and no gradient reaches what would move it."""
    results = []
    for _ in range(2):
        rule, *rest = problem(torch.float64, 2)
        rule.bias.data.fill_(bias)
        results.append(derivatives(rule, *rest))
        own = [name for name, _ in rule.named_parameters()].index("bias")
        assert not bool(results[-1][2][own - len([*rule.parameters()])].any())
        monkeypatch.setattr(gate_kernels, "fits", lambda step: False)
    for one, two in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_where_the_kernels_do_not_fit(monkeypatch):
    rule, slow, fast, gradients, _ = problem(torch.float64, 2)
    mixed = {name: gradient.float() for name, gradient in gradients.items()}
    expected, _ = rule(fast, {n: g.double() for n, g in mixed.items()}, slow, None)
    found, _ = rule(fast, mixed, slow, None)
    for name in fast:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(cpu_kernels, "fits", lambda tensor: False)
    monkeypatch.setattr(gate_kernels, "move", None)  # is not called
    rule(fast, gradients, slow, None)
