import pytest
import torch

from metalm.language.network.scan import by_doubling, by_steps, scan

SHAPE = (3, 2)


def problem(time, seed=1):
    generator = torch.Generator().manual_seed(seed)
    links = torch.rand(time - 1, *SHAPE, generator=generator, dtype=torch.float64)
    return links, torch.randn(time, *SHAPE, generator=generator, dtype=torch.float64)


def in_closed_form(links, values):
    """y_t = sum over s <= t of a_s times the product of the links from s to t."""
    found = []
    for time in range(len(values)):
        terms = [values[s] * links[s:time].prod(0) for s in range(time + 1)]
        found.append(torch.stack(terms).sum(0))
    return torch.stack(found)


@pytest.mark.parametrize("walk", [by_steps, by_doubling, scan])
@pytest.mark.parametrize("time", [1, 2, 3, 7, 8, 9, 20])
def test_a_scan_equals_the_sum_of_products(walk, time):
    links, values = problem(time)
    torch.testing.assert_close(walk(links, values), in_closed_form(links, values))


@pytest.mark.parametrize("walk", [by_steps, by_doubling])
def test_what_goes_in_is_left_alone(walk):
    links, values = problem(5)
    before = links.clone(), values.clone()
    walk(links, values)
    assert torch.equal(links, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize("time", [1, 2, 6])
def test_first_and_second_derivative_against_finite_differences(time):
    leaves = tuple(leaf.requires_grad_() for leaf in problem(time))
    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


def test_third_derivative_against_the_closed_form():
    leaves = [leaf.requires_grad_() for leaf in problem(4)]

    def third(function):
        value = function(*leaves).pow(3).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(gradient.pow(2).sum() for gradient in gradients)
        return torch.autograd.grad(value, leaves)

    for found, expected in zip(third(scan), third(in_closed_form), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("walk", [by_steps, by_doubling])
def test_the_future_changes_no_bit_of_the_past(walk):
    links, values = problem(11)
    before = walk(links, values)
    for place in range(11):
        later_links, later = links.clone(), values.clone()
        later_links[place:] *= 0.3
        later[place + 1 :] -= 2
        assert torch.equal(walk(later_links, later)[: place + 1], before[: place + 1])
