"""Methods by name, made for the tasks that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from metalm.fewshot.images import LabelledImages
from metalm.fewshot.matching import Matching
from metalm.fewshot.method import FewShotMethod
from metalm.fewshot.networks import Conv4
from metalm.fewshot.pixels import NearestPixels
from metalm.fewshot.presets import FewShotConfig
from metalm.fewshot.prototypical import Prototypical
from metalm.fewshot.relation import Relation
from metalm.fewshot.siamese import Objective, Siamese
from metalm.fewshot.snail import Snail

Builder = Callable[[FewShotConfig, LabelledImages], FewShotMethod]


def encoder(config: FewShotConfig, images: LabelledImages) -> Conv4:
    """Four convolutions for these pictures."""
    channels, side, _ = images.shape
    network = config.network
    return Conv4(
        channels=channels,
        size=side,
        width=network.width,
        pooling=network.pooling,
        statistics=network.statistics,
    )


def _prototypical(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    return Prototypical(encoder(config, images), config.network.statistics)


def _matching(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    return Matching(encoder(config, images), config.network.statistics)


def _siamese(objective: Objective) -> Builder:
    def build(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
        body = encoder(config, images)
        return Siamese(
            body, config.network.statistics, objective=objective, num_features=body.num_features
        )

    return build


def _relation(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    channels, side, _ = images.shape
    network = config.network
    return Relation(
        channels=channels, size=side, width=network.width, statistics=network.statistics
    )


def _snail(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    body, shape = encoder(config, images), config.trained_on
    return Snail(
        body,
        config.network.statistics,
        num_features=body.num_features,
        way=config.task.way,
        max_shot=max(shape.shot, config.task.shot),
    )


def _pixels(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    del config, images
    return NearestPixels()


# Methods for pictures; none of them adapts a network by gradients.
METRIC: Mapping[str, Builder] = {
    "prototypical": _prototypical,
    "matching": _matching,
    "siamese-pairs": _siamese("pairs"),
    "siamese-contrastive": _siamese("contrastive"),
    "siamese-triplet": _siamese("triplet"),
    "relation": _relation,
    "snail": _snail,
    "pixels": _pixels,
}


def made(config: FewShotConfig, images: LabelledImages | None = None) -> FewShotMethod:
    """The method that a configuration names, not yet trained.

    Raises:
        ValueError: there is no such method, or it needs pictures; the message lists the names.
    """
    if config.method not in METRIC:
        raise ValueError(
            f"unknown method; expected one of {', '.join(METRIC)}, found {config.method!r}; choose "
            "one of them"
        )
    if images is None:
        raise ValueError(
            f"the method {config.method!r} compares pictures; expected a task of pictures, found "
            f"{config.task.source!r}; choose another method or task"
        )
    return METRIC[config.method](config, images)
