"""Pictures to learn from that are a little turned, sheared, scaled and shifted.

Koch, Zemel, Salakhutdinov 2015 (siamese networks for Omniglot) learnt from such copies, too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metalm.fewshot.tasks.episodes import Episode, EpisodeSource

# Each part is drawn with this probability, evenly up to these bounds.
PROBABILITY = 0.5
TURN = math.radians(10)
SHEAR = 0.3
SCALE = 0.2
SHIFT = 2 / 105
"""Of the side: 2 pixels of the original pictures."""


def draw_maps(count: int, generator: torch.Generator) -> Tensor:
    """Affine maps of the plane, float32 [count, 2, 3], that take a point (x, y) to A (x, y) + b.

    A is a rotation times a shear of x and y times their scales; the sides of a picture have length
    2, and its middle is 0.
    """
    drawn = torch.rand(count, 7, generator=generator) * 2 - 1
    drawn = drawn * (torch.rand(count, 7, generator=generator) < PROBABILITY)
    turn = TURN * drawn[:, 0]
    one = torch.ones(count)
    rotation = _matrices(turn.cos(), -turn.sin(), turn.sin(), turn.cos())
    shear = _matrices(one, SHEAR * drawn[:, 1], SHEAR * drawn[:, 2], one)
    scale = torch.diag_embed(1 + SCALE * drawn[:, 3:5])
    return torch.cat((rotation @ shear @ scale, 2 * SHIFT * drawn[:, 5:, None]), 2)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack((a, b, c, d), 1).view(-1, 2, 2)


def mapped(pictures: Tensor, maps: Tensor) -> Tensor:
    """What is at a point goes where the picture's map takes it, bilinearly; borders go on.

    Args:
        pictures: ``[count, channels, side, side]``.
        maps: ``[count, 2, 3]``; see `draw_maps`. x points right and y down.
    """
    back = torch.linalg.inv(maps[:, :, :2])
    theta = torch.cat((back, -back @ maps[:, :, 2:]), 2)
    grid = functional.affine_grid(theta, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


class DistortedEpisodes:
    """The episodes of a source, with each of their pictures distorted for itself.

    Args:
        source: of episodes of pictures.
        seed: of what is drawn here.
    """

    def __init__(self, source: EpisodeSource, seed: int) -> None:
        self.source = source
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, count: int) -> Episode:
        """The next `count` tasks."""
        episode = self.source.sample(count)
        return episode._replace(
            support_inputs=self._distorted(episode.support_inputs),
            query_inputs=self._distorted(episode.query_inputs),
        )

    def state_dict(self) -> dict[str, Any]:
        """The source's state and that of the generator."""
        return {"source": self.source.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the episodes with this state stood."""
        self.source.load_state_dict(state["source"])
        self.generator.set_state(state["generator"])

    def _distorted(self, pictures: Tensor) -> Tensor:
        flat = pictures.flatten(0, 1)
        return mapped(flat, draw_maps(len(flat), self.generator)).view_as(pictures)
