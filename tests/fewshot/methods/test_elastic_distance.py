"""The elastic distance against its definition, place by place."""

import itertools

import pytest
import torch

from metalm.fewshot.methods.elastic_distance import elastic_distance
from metalm.fewshot.methods.elastic_prototypical import ElasticPrototypical
from metalm.fewshot.methods.networks import Conv4


def stacks(count, seed, height=3, width=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 5, height, width, generator=generator, dtype=torch.float64)


def by_hand(one, other, reach):
    """Of two stacks of maps [maps, height, width]."""
    _, height, width = one.shape
    total = 0.0
    for y, x in itertools.product(range(height), range(width)):
        for near, far in ((one, other), (other, one)):
            total += min(
                float((near[:, y, x] - far[:, v, u]).square().sum())
                for v in range(max(0, y - reach), min(height, y + reach + 1))
                for u in range(max(0, x - reach), min(width, x + reach + 1))
            )
    return total


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 4), (1, 4), (5, 2), (1, 1)])
@pytest.mark.parametrize("reach", [0, 1, 2, 5])
def test_it_is_what_its_definition_says(reach, height, width):
    left, right = stacks(3, 1, height, width), stacks(2, 2, height, width)
    found = elastic_distance(left, right, reach)
    assert found.shape == (2, 3, 2)
    for task, i, j in itertools.product(range(2), range(3), range(2)):
        expected = by_hand(left[task, i], right[task, j], reach)
        assert float(found[task, i, j]) == pytest.approx(expected, rel=1e-10)


def test_without_reach_it_is_twice_the_euclidean_one():
    left, right = stacks(3, 1), stacks(2, 2)
    expected = 2 * torch.cdist(left.flatten(2), right.flatten(2)).square()
    torch.testing.assert_close(elastic_distance(left, right, 0), expected)


def test_what_moved_by_a_place_is_the_same_but_for_the_border():
    picture = torch.zeros(1, 1, 2, 6, 6)
    picture[..., 2:4, 2:4] = torch.randn(2, 2, 2)
    moved = picture.roll((1, 1), (3, 4))
    assert elastic_distance(picture, moved, 1).item() == pytest.approx(0, abs=1e-5)
    assert elastic_distance(picture, moved, 0).item() > 1
    assert elastic_distance(picture, picture.roll(2, 4), 1).item() > 0.1


def test_its_gradient():
    left, right = stacks(2, 3).requires_grad_(), stacks(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: elastic_distance(a, b, 1), (left, right))


def test_a_reach_below_zero():
    with pytest.raises(ValueError, match="expected at least 0 places, found -1"):
        elastic_distance(stacks(1, 1), stacks(1, 2), -1)


def test_a_method_without_reach_answers_as_prototypical_networks_do():
    torch.manual_seed(0)
    encoder = Conv4(size=8, width=3, halvings=1, statistics="running")
    method = ElasticPrototypical(encoder, "running", reach=0)
    support, query = torch.rand(1, 4, 1, 8, 8), torch.rand(1, 5, 1, 8, 8)
    found = method.predict(support, torch.tensor([[0, 1, 1, 0]]), query)
    with torch.no_grad():
        encoder.eval()
        own, near = encoder(query[0]), encoder(support[0])
        prototypes = torch.stack([near[[0, 3]].mean(0), near[[1, 2]].mean(0)])
        apart = torch.cdist(own, prototypes).square()
    expected = -2 * 64 / encoder.num_features * apart
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
