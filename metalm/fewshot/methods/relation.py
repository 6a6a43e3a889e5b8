"""Relation networks (Sung et al. 2018, arXiv 1711.06025): the comparison itself is learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.fewshot.methods.by_class import class_sums
from metalm.fewshot.methods.metric_method import MetricMethod
from metalm.fewshot.methods.networks import Statistics, normalisation
from metalm.meta.layers.fused_layers import fused

# Before the answer.
UNITS = 8


def _block(before: int, after: int, statistics: Statistics, *, padding: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, padding=padding)
    return [convolution, normalisation(after, statistics), nn.ReLU()]


class RelationEncoder(nn.Sequential):
    """Four convolutions, the first two followed by 2 x 2 maxima: 64 x 5 x 5 for 28 x 28 pixels."""

    def __init__(self, *, channels: int = 1, width: int = 64, statistics: Statistics) -> None:
        super().__init__(
            *_block(channels, width, statistics, padding=0),
            nn.MaxPool2d(2),
            *_block(width, width, statistics, padding=0),
            nn.MaxPool2d(2),
            *_block(width, width, statistics, padding=1),
            *_block(width, width, statistics, padding=1),
        )


class RelationHead(nn.Module):
    """From two stacks of maps to one number: two convolutions with maxima, then 8 units.

    Args:
        width: maps of the encoder.
        side: pixels of a side of these maps; at least 4.
        statistics: of batch normalisation.
    """

    def __init__(self, *, width: int = 64, side: int = 5, statistics: Statistics) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            *_block(2 * width, width, statistics, padding=1),
            nn.MaxPool2d(2),
            *_block(width, width, statistics, padding=1),
            nn.MaxPool2d(2),
        )
        self.units = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width * (side // 4) ** 2, UNITS),
            nn.ReLU(),
            nn.Linear(UNITS, 1),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """Relations [pairs], before the sigmoid, of maps [pairs, 2 width, side, side]."""
        return self.units(self.maps(pairs)).squeeze(-1)


class Relation(MetricMethod):
    """The relation score r of a query with a class, trained to be 1 for its own and 0 for others.

        r_k = sigmoid(g([sum over class k of f(x_i), f(x)]))      loss = mean of (r_k - [y = k])^2

    The logits are those of r: the order of the classes is the same. The encoder's maps are summed
    over the support of a class, as the paper does for several shots (section 3.3).

    Args:
        channels: of the pictures.
        size: pixels of their sides.
        width: maps of every convolution.
        statistics: of batch normalisation, in the encoder and in the head.

    Raises:
        ValueError: the pictures are too small.
    """

    def __init__(
        self, *, channels: int = 1, size: int = 28, width: int = 64, statistics: Statistics
    ) -> None:
        side = ((size - 2) // 2 - 2) // 2
        if side < 4:
            raise ValueError(
                "the pictures are too small for a relation network; expected at least 22 pixels, "
                f"found {size}; prepare larger ones"
            )
        encoder = RelationEncoder(channels=channels, width=width, statistics=statistics)
        super().__init__(fused(encoder), statistics)
        self.head = fused(RelationHead(width=width, side=side, statistics=statistics))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # as in the authors' code
                deviation = (2 / (part.kernel_size[0] ** 2 * part.out_channels)) ** 0.5
                nn.init.normal_(part.weight, 0, deviation)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def memory(self, features: Tensor, targets: Tensor) -> Tensor:
        """Summed maps of each class, [tasks, way, width, side, side]."""
        return class_sums(features, targets)

    def compare(self, memory: Tensor, features: Tensor) -> Tensor:
        """Relations before the sigmoid, [tasks, queries, way]."""
        queries, way = features.shape[1], memory.shape[1]
        pairs = torch.cat(
            [
                memory.unsqueeze(1).expand(-1, queries, *memory.shape[1:]),
                features.unsqueeze(2).expand(-1, -1, way, *features.shape[2:]),
            ],
            3,
        )
        return self.by_task(self.head, pairs.flatten(1, 2)).unflatten(1, (queries, way))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the relation scores."""
        wanted = functional.one_hot(targets, logits.shape[-1]).to(logits.dtype)
        return functional.mse_loss(logits.sigmoid(), wanted)
