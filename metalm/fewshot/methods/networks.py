"""The networks of the literature on few examples.

Whose statistics batch normalisation uses is always named: "transductive" takes those of the inputs
that are fed together, in use as in training; "running" takes them in training alone, and in use the
averages of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from metalm.meta.layers.fused_layers import fused

Statistics = Literal["transductive", "running"]
Pooling = Literal["max", "stride"]
Start = Literal["usual", "truncated"]

# Standard deviation of the weights of the sine network at the start (Finn et al. 2017, code).
TRUNCATED_DEVIATION = 0.01


def normalisation(
    width: int, statistics: Statistics, *, maps: bool = True
) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """Batch normalisation of maps [items, width, height, width], or of [items, width].

    Raises:
        ValueError: there are no such statistics.
    """
    if statistics not in ("transductive", "running"):
        raise ValueError(
            "unknown statistics for batch normalisation; expected transductive or running, found "
            f"{statistics!r}; choose one of them"
        )
    layer = nn.BatchNorm2d if maps else nn.BatchNorm1d
    return layer(width, track_running_stats=statistics == "running")


class Conv4(nn.Module):
    """Four times 3 x 3 convolution, batch normalisation, ReLU; or another number of times.

    With pooling "max", each is followed by a maximum over 2 x 2, and the last maps are the
    features: 64 for 28 x 28 pixels (Vinyals et al. 2016; Snell et al. 2017). With "stride", each
    convolution has stride 2 and the features are the means of the last maps (Finn et al. 2017,
    Omniglot). With fewer halvings than layers, the last layers have neither.

    Args:
        channels: of the pictures.
        size: pixels of their sides.
        width: maps of each layer.
        late_width: maps from the third layer on, if they are others.
        pooling: see above.
        halvings: layers that halve the sides, the first ones.
        depth: layers.
        statistics: of batch normalisation.

    Attributes:
        num_features: numbers that a picture becomes.
        num_in_maps: numbers in its last maps.

    Raises:
        ValueError: the pictures are too small, there are fewer layers than halvings, or none.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        size: int = 28,
        width: int = 64,
        late_width: int | None = None,
        pooling: Pooling = "max",
        halvings: int = 4,
        depth: int = 4,
        statistics: Statistics,
    ) -> None:
        super().__init__()
        late_width = late_width or width
        if depth < 1:
            raise ValueError(
                f"impossible depth; expected at least 1 layer, found {depth}; do change it"
            )
        widths = [channels, width, width, *[late_width] * depth][: depth + 1]
        if not 0 <= halvings < len(widths):
            raise ValueError(
                f"impossible number of halvings; expected 0 to {len(widths) - 1}, one a layer at "
                f"most, found {halvings}; do change it"
            )
        if pooling == "max" and size < 2**halvings:
            raise ValueError(
                f"the pictures are too small to be halved {halvings} times; expected at least "
                f"{2**halvings} pixels, found {size}; prepare larger ones, or use pooling by stride"
            )
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            halves = number < halvings
            stride = 2 if halves and pooling == "stride" else 1
            layers.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
            layers.append(normalisation(after, statistics))
            layers.append(nn.ReLU())
            if halves and pooling == "max":
                layers.append(nn.MaxPool2d(2))
        self.layers = fused(nn.Sequential(*layers))
        self.pooling = pooling
        self.statistics = statistics
        side = size
        for _ in range(halvings):
            side = side // 2 if pooling == "max" else (side + 1) // 2
        self.num_in_maps = widths[-1] * side * side
        self.num_features = self.num_in_maps if pooling == "max" else widths[-1]

    def maps(self, pictures: Tensor) -> Tensor:
        """The last maps [pictures, maps, height, width] of [pictures, channels, size, size]."""
        return self.layers(pictures)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [pictures, num_features] of pictures [pictures, channels, size, size]."""
        maps = self.maps(pictures)
        return maps.flatten(1) if self.pooling == "max" else maps.mean((2, 3))


class FullyConnected(nn.Module):
    """Layers of matrix, batch normalisation, ReLU on the pixels in a row.

    The widths of Finn et al. 2017 (Omniglot without convolutions), after Santoro et al. 2016.

    Args:
        inputs: numbers of a picture.
        widths: units of each layer.
        statistics: of batch normalisation.

    Attributes:
        num_features: numbers that a picture becomes.
    """

    def __init__(
        self,
        *,
        inputs: int = 784,
        widths: Sequence[int] = (256, 128, 64, 64),
        statistics: Statistics,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise([inputs, *widths]):
            layers += [
                nn.Linear(before, after),
                normalisation(after, statistics, maps=False),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.statistics = statistics
        self.num_features = widths[-1]

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [pictures, num_features] of pictures [pictures, ...]."""
        return self.layers(pictures)


class Classifier(nn.Module):
    """An encoder (`body`) and a matrix on its features (`head`): logits of `way` classes.

    Args:
        body: with the attribute `num_features`.
        way: classes.
    """

    def __init__(self, body: Conv4 | FullyConnected, way: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.num_features, way)
        self.statistics = body.statistics

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [pictures, way]."""
        return self.head(self.body(pictures))


class SineNetwork(nn.Module):
    """A function of one number: matrices with ReLU between (Finn et al. 2017: 1-40-40-1).

    Args:
        widths: units of the hidden layers.
        start: of the weights: "truncated" as published, normal with deviation 0.01 cut at two
            deviations, and zero biases; or "usual", as torch begins.
    """

    def __init__(self, widths: Sequence[int] = (40, 40), *, start: Start = "usual") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([1, *widths]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] if widths else 1, 1)
        self.statistics = "none"
        if start == "truncated":
            with torch.no_grad():
                for part in self.modules():
                    if isinstance(part, nn.Linear):
                        deviation = TRUNCATED_DEVIATION
                        nn.init.trunc_normal_(
                            part.weight, std=deviation, a=-2 * deviation, b=2 * deviation
                        )
                        part.bias.zero_()

    def forward(self, points: Tensor) -> Tensor:
        """Values [..., 1] at points [..., 1]."""
        return self.head(self.body(points))
