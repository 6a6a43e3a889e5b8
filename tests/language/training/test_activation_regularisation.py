import pytest
import torch

from metalm.language.training.activation_regularisation import activation_penalty, slowness_penalty

TIME, ROWS, SIZE = 5, 3, 4


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TIME, ROWS, SIZE, generator=generator, dtype=torch.float64)


def test_the_activation_penalty_and_its_gradient(values):
    own = values.tolist()
    values.requires_grad_()
    found = activation_penalty(values, 0.7)
    expected = sum(number**2 for of_time in own for row in of_time for number in row)
    assert found.item() == pytest.approx(0.7 * expected / (TIME * ROWS * SIZE), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, values)
    torch.testing.assert_close(gradient, 2 * 0.7 * values.detach() / (TIME * ROWS * SIZE))


def test_the_slowness_penalty_and_its_gradient(values):
    """The gradient of a chain of squared differences, by hand: (2 h_t - h_{t-1} - h_{t+1})."""
    own = values.tolist()
    values.requires_grad_()
    found = slowness_penalty(values, 0.9)
    terms = (TIME - 1) * ROWS * SIZE
    expected = sum(
        (own[t + 1][r][i] - own[t][r][i]) ** 2
        for t in range(TIME - 1)
        for r in range(ROWS)
        for i in range(SIZE)
    )
    assert found.item() == pytest.approx(0.9 * expected / terms, rel=1e-12)
    (gradient,) = torch.autograd.grad(found, values)
    values = values.detach()
    by_hand = torch.zeros_like(values)
    for t in range(TIME):
        for other in (t - 1, t + 1):
            if 0 <= other < TIME:
                by_hand[t] += 2 * 0.9 * (values[t] - values[other]) / terms
    torch.testing.assert_close(gradient, by_hand)


def test_a_single_step_is_not_slow_or_fast(values):
    assert float(slowness_penalty(values[:1], 3.0)) == 0.0


def test_activations_of_bfloat16_are_averaged_in_float32():
    values = torch.full((3, 2, 5), 1.01).bfloat16()
    exact = float(values[0, 0, 0]) ** 2
    assert activation_penalty(values, 1.0).dtype == torch.float32
    assert float(activation_penalty(values, 1.0)) == pytest.approx(exact, rel=1e-6)
    assert slowness_penalty(values, 1.0).dtype == torch.float32
