"""Adam against torch's own, step by step, and its derivatives against finite differences."""

import pytest
import torch

from metalm.meta.rules import Adam
from metalm.meta.unroll import unroll


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
def test_the_steps_of_torch(betas):
    torch.manual_seed(1)
    start = {"a": torch.randn(3, 2).double(), "b": torch.randn(4).double()}
    twins = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimiser = torch.optim.Adam(twins.values(), lr=0.07, betas=betas, eps=1e-3)
    rule = Adam(0.07, betas, 1e-3)
    fast, state = start, rule.initial_state(start)
    for step in range(6):
        gradients = {name: torch.randn_like(tensor) for name, tensor in start.items()}
        gradients["a"][0] = 0.0  # these never move
        if step == 2:
            gradients["b"].zero_()
        fast, state = rule(fast, gradients, start, state)
        for name, tensor in twins.items():
            tensor.grad = gradients[name].clone()
        optimiser.step()
        for name, tensor in twins.items():
            torch.testing.assert_close(fast[name], tensor.detach(), rtol=1e-14, atol=1e-15)
    assert torch.equal(fast["a"][0], start["a"][0])


def test_the_slope_at_a_gradient_of_zero():
    """One step from zero moments is -rate g / (|g| + eps), whose slope at 0 is -rate / eps."""
    rule = Adam(0.5, eps=0.02)
    weights = {"w": torch.zeros(2).double()}
    gradient = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    fast, _ = rule(weights, {"w": gradient}, weights, rule.initial_state(weights))
    fast["w"].sum().backward()
    torch.testing.assert_close(gradient.grad, torch.full((2,), -0.5 / 0.02, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2])
def test_zero_gradients_stay_finite(order):
    """A dead ReLU and a zero layer: most inner gradients are zero in every step."""

    def loss(parameters, batch, state):
        hidden = torch.relu(batch @ parameters["into"].T - 9.0 * torch.tensor([1.0, 0, 0]).double())
        return (hidden @ parameters["out"] - 1).square().mean(), None, state

    torch.manual_seed(2)
    slow = {
        "into": torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        "out": torch.zeros(3, dtype=torch.float64, requires_grad=True),
    }
    batches = [torch.randn(5, 2, dtype=torch.float64) for _ in range(4)]
    rule = Adam(0.1, eps=0.1)

    def read(order):
        return unroll(loss, rule, slow, {}, batches, None, weights=[0, 0, 0, 1], order=order)

    gradients = torch.autograd.grad(read(order).meta_loss, list(slow.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if order == 2:
        direction = torch.tensor([0.3, -1.0, 0.7]).double()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                slow["out"].add_(sign * 1e-6 * direction)
                values.append(read(0).meta_loss.item())
                slow["out"].sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        assert (gradients[1] @ direction).item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("numbers", [{"rate": -1.0}, {"rate": 1.0, "eps": 0.0}])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="impossible Adam"):
        Adam(**numbers)
