import math

import pytest
import torch

from metalm.language.training.one_cycle_adam import OneCycleAdam, cycle_point

PUBLISHED = {
    "epochs": 90,
    "learning_rate": 5e-3,
    "weight_decay": 1.2e-6,
    "phases": (7.5, 37.5, 37.5, 7.5),
    "division": 10.0,
    "momenta": (0.8, 0.7),
    "beta2": 0.99,
}


@pytest.mark.parametrize(
    ("done", "rate", "momentum"),
    [
        (0.0, 5e-4, 0.8),
        (3.75, 2.75e-3, 0.75),
        (7.5, 5e-3, 0.7),
        (30.0, 5e-3, 0.7),
        (45.0, 5e-3, 0.7),
        (63.75, 2.75e-3, 0.75),
        (82.5, 5e-4, 0.8),
        (86.25, 2.5e-4, 0.8),
        (85.0, 2.5e-4 * (1 + math.cos(math.pi / 3)), 0.8),
        (90.0, 0.0, 0.8),
    ],
)
def test_the_published_cycle_at_the_ends_and_middles_of_its_phases(done, rate, momentum):
    adam = OneCycleAdam({"w": torch.zeros(1, requires_grad=True)}, **PUBLISHED)
    found = adam.at(done)
    assert found[0] == pytest.approx(rate, rel=1e-12, abs=1e-15)
    assert found[1] == pytest.approx(momentum, rel=1e-12)


def test_a_cycle_keeps_its_form_at_another_length():
    for share in (0.0, 0.05, 0.2, 0.5, 0.83, 0.93, 1.0):
        published = cycle_point(share, (7.5, 37.5, 37.5, 7.5))
        assert cycle_point(share, (1, 5, 5, 1)) == pytest.approx(published)


def test_phases_may_be_left_out():
    assert cycle_point(0.25, (0, 0, 1, 0)).height == pytest.approx(0.75)
    assert cycle_point(1.0, (1, 1, 1, 0)) == (0.0, 1.0)
    assert cycle_point(0.5, (0, 0, 0, 2)).annealing == pytest.approx(0.5)


def test_steps_equal_adam_written_out():
    """L2 in the gradient, and the beta1 of the moment in mean and bias correction."""
    settings = {**PUBLISHED, "epochs": 4, "weight_decay": 0.1, "learning_rate": 0.2}
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    weight = start.clone().requires_grad_()
    adam = OneCycleAdam({"w": weight}, **settings)
    plain, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(8):
        gradient = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        done = step / 2
        rate, beta1 = adam.at(done)
        weight.grad = gradient.clone()
        assert adam.step(done, 0.5) == pytest.approx(0.5 * rate)
        decayed = gradient + 0.1 * plain
        mean = beta1 * mean + (1 - beta1) * decayed
        square = 0.99 * square + 0.01 * decayed**2
        scale = (square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
        plain = plain - 0.5 * rate * mean / (1 - beta1 ** (step + 1)) / scale
        torch.testing.assert_close(weight.detach(), plain)
    assert adam.weights["w"] is adam.result["w"] is weight
