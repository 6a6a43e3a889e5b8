"""The LSTM meta-learner against torch's own cell, coordinate by coordinate."""

import math

import pytest
import torch
from torch import nn

from metalm.meta.module_fork import fork
from metalm.meta.rules.meta_lstm import MetaLSTM
from metalm.meta.unroll import unroll

HIDDEN = 3


def problem():
    torch.manual_seed(3)
    slow = {
        "a": torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        "b": torch.randn(2, dtype=torch.float64, requires_grad=True),
    }
    batches = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(4)]
    rule = MetaLSTM(slow, HIDDEN, seed=2)
    with torch.no_grad():
        for tensor in rule.parameters():  # larger, so that every path counts
            tensor.mul_(0.3).add_(0.2 * torch.randn_like(tensor))
    return slow, batches, rule


def value(parameters, batch):
    inputs, targets = batch
    outputs = torch.tanh(inputs @ parameters["a"].mT + parameters["b"])
    return 1e-2 * (outputs - targets).square().mean()


def loss(parameters, batch, state):
    return value(parameters, batch), None, state


def seen(x):
    if abs(x) >= math.exp(-10):
        return math.log(abs(x)) / 10, math.copysign(1.0, x)
    return -1.0, math.exp(10) * x


def by_hand(slow, batches, rule, weights):
    """A loop over coordinates with nn.LSTMCell; gradients and losses detached."""
    cell = nn.LSTMCell(4, HIDDEN).double()
    own = {
        "weight_ih": rule.into, "weight_hh": rule.again,
        "bias_ih": rule.bias, "bias_hh": torch.zeros(4 * HIDDEN).double(),
    }  # fmt: skip
    flat = torch.cat([tensor.flatten() for tensor in slow.values()])
    count = len(flat)
    memory = (torch.zeros(count, HIDDEN).double(), torch.zeros(count, HIDDEN).double())
    gates = [torch.zeros(count).double(), torch.zeros(count).double()]
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        fast = {"a": flat[:6].view(2, 3), "b": flat[6:]}
        found = value(fast, batch)
        total = total + weight * found
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in fast.items()}
        slopes = torch.autograd.grad(value(leaves, batch), list(leaves.values()))
        gradient = torch.cat([slope.flatten() for slope in slopes])
        rows = [[*seen(found.item()), *seen(slope.item())] for slope in gradient]
        memory = torch.func.functional_call(
            cell, own, (torch.tensor(rows, dtype=torch.float64), memory)
        )
        parts = ((rule.forget_weight, rule.forget_bias), (rule.enter_weight, rule.enter_bias))
        gates = [
            torch.sigmoid(torch.cat([memory[0], flat[:, None], gate[:, None]], 1) @ w + bias)
            for gate, (w, bias) in zip(gates, parts, strict=True)
        ]
        flat = gates[0] * flat - gates[1] * gradient
    return total, flat


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize("rows", [None, 2])
def test_against_torch_and_plain_autograd(rows, segment):
    slow, batches, rule = problem()
    weights = [0.0, 0.5, 0.0, 1.0]
    total, last = by_hand(slow, batches, rule, weights)
    leaves = [*slow.values(), *rule.parameters()]
    expected = torch.autograd.grad(total + last.sin().sum(), leaves)

    def loss_of_rows(parameters, batch, state):
        return torch.func.vmap(lambda p: value(p, batch))(parameters), None, state

    done = unroll(
        loss if rows is None else loss_of_rows, rule, slow, {}, batches, None,
        rows=rows, weights=weights, segment=segment,
    )  # fmt: skip
    ends = torch.cat([tensor.reshape(rows or 1, -1) for tensor in done.fast.values()], 1)
    torch.testing.assert_close(ends, last.expand(rows or 1, -1))
    found = torch.autograd.grad(done.meta_loss + ends.sin().sum(), leaves)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one / (rows or 1), two, rtol=1e-9, atol=1e-13)


def test_it_starts_near_gradient_descent():
    """With the first biases of the authors, f is 0.98 to 0.994 and i 0.006 to 0.018."""
    slow, batches, _ = problem()
    rule = MetaLSTM(slow)
    done = unroll(loss, rule, slow, {}, batches[:1], None, order=0)
    state = done.rule_state
    assert bool(((state.forget > 0.97) & (state.forget < 0.995)).all())
    assert bool(((state.enter > 0.005) & (state.enter < 0.02)).all())


@pytest.mark.parametrize("segment", [None, 1])
def test_beside_parameters_that_are_meta_learned(segment):
    """At first order what is not fast has a gradient of the losses alone: the rule sees none."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    head = fork(network, ["2.*"])
    rule = MetaLSTM(head.slow).double()
    done = head.unroll(rule, [(x, y)] * 3, loss, order=1, segment=segment)
    first = network[0].weight
    (found,) = torch.autograd.grad(done.meta_loss, [first], retain_graph=True)
    # The same steps with gradients held constant, by finite differences of the losses' sum.
    fixed, step, expected = [], 1e-6, torch.zeros_like(first)
    for number in range(3):
        part = head.unroll(rule, [(x, y)] * (number + 1), loss, order=0, update_last=False)
        fixed.append({name: weight.detach() for name, weight in part.fork.fast.items()})

    def total(weight):
        body = {"0.weight": weight, "0.bias": network[0].bias.detach()}
        outputs = [torch.func.functional_call(network, {**body, **head}, (x,)) for head in fixed]
        return sum(nn.functional.mse_loss(output, y) for output in outputs)

    for place in range(first.numel()):
        moved = torch.zeros(first.numel(), dtype=torch.float64)
        moved[place] = step
        moved = moved.view_as(first)
        difference = total(first.detach() + moved) - total(first.detach() - moved)
        expected.view(-1)[place] = difference.detach() / (2 * step)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-8)
