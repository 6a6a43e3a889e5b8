"""Consolidation against the minimum that Newton's method finds, and its limits."""

import math

import pytest
import torch

from metalm.meta.consolidation import consolidate, relative_fisher

SHAPES = {"matrix": (3, 2), "vector": (5,)}


@pytest.fixture
def weights():
    """slow, fast, home and a Fisher with zeros, in float64."""
    generator = torch.Generator().manual_seed(4)

    def draw():
        return {
            n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()
        }

    slow, fast, home, fisher = (draw() for _ in range(4))
    fisher = {name: tensor.clamp(min=0.0) * 3 for name, tensor in fisher.items()}
    assert all((tensor == 0).any() and (tensor > 0).any() for tensor in fisher.values())
    return slow, fast, home, fisher


def flat(parameters):
    return torch.cat([parameters[name].flatten() for name in SHAPES])


def brute_force(slow, fast, home, fisher, share, elasticity):
    """The least of the objective, written out term by term, by Newton steps of autograd."""
    slow, fast, home, fisher = (flat(part) for part in (slow, fast, home, fisher))

    def objective(w):
        total = 0.0
        for i in range(len(w)):
            total = total + share / 2 * (w[i] - fast[i]) ** 2
            total = total + (1 - share) / 2 * (w[i] - slow[i]) ** 2
            total = total + elasticity / 2 * fisher[i] * (w[i] - home[i]) ** 2
        return total

    point = torch.zeros_like(slow)
    for _ in range(2):  # one step reaches the least of a quadratic; the second stays
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf), leaf)
        hessian = torch.autograd.functional.hessian(objective, point)
        point = point - torch.linalg.solve(hessian, gradient)
    assert gradient.abs().max() < 1e-10
    return point


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("elasticity", [0.0, 0.07, 2.0, 300.0])
def test_it_is_the_least_of_the_three_quadratics(weights, share, elasticity):
    found = flat(consolidate(*weights, share, elasticity))
    torch.testing.assert_close(found, brute_force(*weights, share, elasticity), rtol=0, atol=1e-12)


def test_without_a_penalty_it_is_the_plain_step(weights):
    slow, fast, _, _ = weights
    found = consolidate(*weights, 0.25, 0.0)
    for name in SHAPES:
        expected = slow[name] + 0.25 * (fast[name] - slow[name])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-15)


def test_all_of_it_without_a_penalty_is_where_the_fast_weights_ended(weights):
    found = consolidate(*weights, 1.0, 0.0)
    assert all(torch.equal(found[name], weights[1][name]) for name in SHAPES)


def test_an_infinite_penalty_keeps_what_the_training_set_depends_on_at_home(weights):
    slow, fast, home, fisher = weights
    found = consolidate(*weights, 0.25, math.inf)
    for name in SHAPES:
        held = fisher[name] > 0
        assert torch.equal(found[name][held], home[name][held])
        free = slow[name] + 0.25 * (fast[name] - slow[name])
        torch.testing.assert_close(found[name][~held], free[~held], rtol=0, atol=1e-15)


def test_it_goes_to_that_limit_without_a_jump(weights):
    limit, near = consolidate(*weights, 0.25, math.inf), consolidate(*weights, 0.25, 1e12)
    for name in SHAPES:
        torch.testing.assert_close(near[name], limit[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_a_larger_penalty_never_goes_farther_from_home(weights, name):
    _, fast, home, fisher = weights
    farness = [
        (consolidate(home, fast, home, fisher, 0.5, e)[name] - home[name]).abs()
        for e in (0.0, 0.1, 1.0, 10.0)
    ]
    held = fisher[name] > 0
    for near, far in zip(farness[1:], farness[:-1], strict=True):
        assert (near[held] < far[held]).all()
        assert torch.equal(near[~held], far[~held])


def test_nothing_that_was_given_changes(weights):
    before = [{name: tensor.clone() for name, tensor in part.items()} for part in weights]
    found = consolidate(*weights, 1.0, 0.0)
    found["vector"].add_(1.0)
    for part, was in zip(weights, before, strict=True):
        assert all(torch.equal(part[name], was[name]) for name in SHAPES)


def test_a_relative_fisher_has_mean_one_and_keeps_its_proportions(weights):
    found = relative_fisher(weights[3])
    assert flat(found).mean().item() == pytest.approx(1.0, rel=1e-14)
    quotients = (flat(weights[3]) / flat(found))[flat(found) > 0]
    torch.testing.assert_close(quotients, quotients[:1].expand_as(quotients))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, None])
def test_what_is_no_fisher_is_refused(weights, value):
    fisher = {name: torch.zeros_like(tensor) for name, tensor in weights[3].items()}
    if value is not None:
        fisher["vector"] += 1.0
        fisher["matrix"][1, 1] = value
    with pytest.raises(ValueError, match="no Fisher information; expected finite numbers >= 0"):
        relative_fisher(fisher)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_an_impossible_share_is_refused(weights, share):
    with pytest.raises(ValueError, match="impossible share of what was read; expected 0 to 1"):
        consolidate(*weights, share, 1.0)


@pytest.mark.parametrize("elasticity", [-1.0, math.nan])
def test_an_impossible_elasticity_is_refused(weights, elasticity):
    with pytest.raises(ValueError, match="impossible elasticity; expected a number >= 0"):
        consolidate(*weights, 0.5, elasticity)


@pytest.mark.parametrize(("place", "what"), [(1, "fast"), (2, "home"), (3, "fisher")])
def test_other_tensors_are_refused(weights, place, what):
    parts = list(weights)
    parts[place] = parts[place] | {"vector": torch.zeros(4, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=rf"the {what} weights do not fit .*vector of shape \(5,\)"
    ):
        consolidate(*parts, 0.5, 1.0)
