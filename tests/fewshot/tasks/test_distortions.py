"""Affine distortions, against shifts by whole pixels, quarter turns and moments of blobs."""

import math

import pytest
import torch

from metalm.fewshot.tasks.distortions import (
    SCALE,
    SHEAR,
    SHIFT,
    TURN,
    DistortedEpisodes,
    draw_maps,
    mapped,
)
from metalm.fewshot.tasks.sources import TaskConfig, draw_pictures, episode_source


@pytest.fixture
def pictures():
    inner = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.pad(inner, (5, 5, 5, 5))


def maps_of(matrix, shift):
    return torch.tensor([[*matrix[0], shift[0]], [*matrix[1], shift[1]]]).expand(3, 2, 3)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -3), (-1, 4)])
def test_a_shift_by_whole_pixels(pictures, right, down):
    side = pictures.shape[-1]
    maps = maps_of(((1.0, 0.0), (0.0, 1.0)), (2 * right / side, 2 * down / side))
    expected = pictures.roll((down, right), (2, 3))
    torch.testing.assert_close(mapped(pictures, maps), expected, atol=1e-5, rtol=0)


def test_a_quarter_turn_from_x_to_y(pictures):
    maps = maps_of(((0.0, -1.0), (1.0, 0.0)), (0.0, 0.0))
    expected = torch.rot90(pictures, -1, (2, 3))  # y points down, so x to y is clockwise
    torch.testing.assert_close(mapped(pictures, maps), expected, atol=1e-5, rtol=0)


def test_a_blob_goes_where_its_map_takes_its_middle():
    side = 64
    places = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(places, places, indexing="ij")
    blob = (-((x - 0.2) ** 2 + (y + 0.15) ** 2) / 0.02).exp().expand(50, 1, side, side)
    maps = draw_maps(50, torch.Generator().manual_seed(1))
    found = mapped(blob, maps).squeeze(1)
    mass = found.sum((1, 2))
    middles = torch.stack(((found * x).sum((1, 2)) / mass, (found * y).sum((1, 2)) / mass), 1)
    expected = (maps[:, :, :2] @ torch.tensor([0.2, -0.15])) + maps[:, :, 2]
    torch.testing.assert_close(middles, expected, atol=3e-3, rtol=0)
    areas = mass / blob[0].sum()
    torch.testing.assert_close(areas, maps[:, :, :2].det(), atol=0.02, rtol=0)


def test_half_of_the_parts_are_drawn_and_within_their_bounds():
    maps = draw_maps(4000, torch.Generator().manual_seed(2))
    shifts = maps[:, :, 2]
    assert 1.9 * SHIFT < shifts.abs().max() <= 2 * SHIFT
    assert abs((shifts == 0).double().mean() - 0.5) < 0.03
    only_turned = ((maps[:, :, :2].det() - 1).abs() < 1e-6) & (maps[:, 0, 0] <= 1)
    turned = maps[only_turned][:, :, :2]
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
    assert 0.9 * TURN < angles.abs().max() <= TURN + SHEAR
    largest = torch.linalg.svdvals(maps[:, :, :2]).max()
    assert 1 + SCALE < largest <= (1 + SCALE) * (1 + SHEAR) + 1e-5
    assert math.isclose(TURN, math.pi / 18)


def test_episodes_to_learn_from_are_distorted_and_go_on_from_a_state():
    config, images = TaskConfig(distorted=True), draw_pictures(28)
    plain = TaskConfig()
    source = episode_source(config, "train", 3, None, images)
    assert isinstance(source, DistortedEpisodes)
    first, expected = source.sample(2), episode_source(plain, "train", 3, None, images).sample(2)
    torch.testing.assert_close(first.support_targets, expected.support_targets)
    away = (first.query_inputs - expected.query_inputs).abs().flatten(2).mean(-1)
    assert (away > 0.01).double().mean() > 0.9
    ink = first.query_inputs.mean() / expected.query_inputs.mean()
    assert 0.9 < ink < 1.15
    state = source.state_dict()
    second = source.sample(1)
    other = episode_source(config, "train", 3, None, images)
    other.sample(3)
    other.load_state_dict(state)
    assert all(map(torch.equal, other.sample(1), second))
    for part in ("validation", "test"):
        found = episode_source(config, part, 3, None, images).sample(1)
        assert torch.equal(
            found.query_inputs,
            episode_source(plain, part, 3, None, images).sample(1).query_inputs,
        )
