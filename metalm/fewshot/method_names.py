"""Methods by name, made for the tasks that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from metalm.fewshot.methods.anil import Anil
from metalm.fewshot.methods.elastic_prototypical import ElasticPrototypical
from metalm.fewshot.methods.from_scratch import FromScratch
from metalm.fewshot.methods.lstm_meta_learner import LstmMetaLearner
from metalm.fewshot.methods.maml import Maml
from metalm.fewshot.methods.matching import Matching
from metalm.fewshot.methods.meta_sgd import MetaSgd
from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.methods.multi_task import MultiTask
from metalm.fewshot.methods.networks import Classifier, Conv4, SineNetwork
from metalm.fewshot.methods.pixels import NearestPixels
from metalm.fewshot.methods.posterior_mean import PosteriorMean
from metalm.fewshot.methods.prototypical import Prototypical
from metalm.fewshot.methods.relation import Relation
from metalm.fewshot.methods.reptile import Reptile
from metalm.fewshot.methods.siamese import Objective, Siamese
from metalm.fewshot.methods.snail import Snail
from metalm.fewshot.methods.transfer import Transfer
from metalm.fewshot.presets import FewShotConfig
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.linear import NOISE, SPREAD
from metalm.fewshot.tasks.sources import CURVES, images_of

Builder = Callable[[FewShotConfig, LabelledImages], FewShotMethod]
AdaptationBuilder = Callable[[FewShotConfig, LabelledImages | None], FewShotMethod]


def encoder(config: FewShotConfig, images: LabelledImages) -> Conv4:
    """The convolutions for these pictures."""
    channels, side, _ = images.shape
    network = config.network
    return Conv4(
        channels=channels,
        size=side,
        width=network.width,
        late_width=network.late_width or None,
        pooling=network.pooling,
        halvings=network.halvings,
        depth=network.depth,
        statistics=network.statistics,
    )


def _prototypical(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    return Prototypical(encoder(config, images), config.network.statistics)


def _elastic(config: FewShotConfig, images: LabelledImages) -> FewShotMethod:
    network = config.network
    return ElasticPrototypical(encoder(config, images), network.statistics, network.reach)


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


# Methods for pictures; none of them takes a step on the support set.
METRIC: Mapping[str, Builder] = {
    "prototypical": _prototypical,
    "prototypical-elastic": _elastic,
    "matching": _matching,
    "siamese-pairs": _siamese("pairs"),
    "siamese-contrastive": _siamese("contrastive"),
    "siamese-triplet": _siamese("triplet"),
    "relation": _relation,
    "snail": _snail,
    "pixels": _pixels,
}


def network(config: FewShotConfig, images: LabelledImages | None) -> nn.Module:
    """What methods of inner updates adapt: `body` and `head`."""
    if images is None:
        return SineNetwork()
    return Classifier(encoder(config, images), config.task.way)


def _options(config: FewShotConfig) -> dict[str, Any]:
    adaptation = config.adaptation
    return {
        "steps": adaptation.steps,
        "step_weights": adaptation.step_weights,
        "test_steps": adaptation.test_steps,
        "together": adaptation.together or None,
        "segment": None if adaptation.checkpoints == "none" else adaptation.checkpoints,
    }


def _with_order(kind: type[Maml] | type[MetaSgd] | type[Anil]) -> AdaptationBuilder:
    def build(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
        adaptation = config.adaptation
        return kind(
            network(config, images),
            rate=adaptation.rate,
            order=adaptation.order,
            **_options(config),
        )

    return build


def _reptile(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
    adaptation = config.adaptation
    return Reptile(
        network(config, images),
        rate=adaptation.rate,
        batch=adaptation.batch or None,
        test_batch=adaptation.test_batch or None,
        adam=adaptation.adam,
        bfloat16=adaptation.bfloat16,
        **_options(config),
    )


def _lstm(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
    return LstmMetaLearner(network(config, images), seed=config.seed, **_options(config))


def _from_scratch(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
    return FromScratch(network(config, images), rate=config.adaptation.rate, **_options(config))


def _multi_task(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
    options = _options(config)
    del options["steps"]
    return MultiTask(network(config, images), rate=config.adaptation.rate, **options)


def _posterior_mean(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
    del config, images
    return PosteriorMean((NOISE / SPREAD) ** 2)


def _transfer(config: FewShotConfig, images: LabelledImages | None) -> FewShotMethod:
    assert images is not None
    options = _options(config)
    del options["steps"]
    return Transfer(
        encoder(config, images),
        classes=images_of(config.task, "train", config.seed, images).num_classes,
        way=config.task.way,
        rate=config.adaptation.rate,
        adam=config.adaptation.adam,
        **options,
    )


# Methods that learn a task by inner updates; for pictures and for curves.
OPTIMIZATION: Mapping[str, AdaptationBuilder] = {
    "maml": _with_order(Maml),
    "meta-sgd": _with_order(MetaSgd),
    "anil": _with_order(Anil),
    "reptile": _reptile,
    "lstm-meta-learner": _lstm,
    "multi-task": _multi_task,
    "from-scratch": _from_scratch,
}

# The closed form, for straight lines alone.
ORACLES: Mapping[str, AdaptationBuilder] = {"posterior-mean": _posterior_mean}

# Baselines of inner updates for pictures alone.
BY_CLASS: Mapping[str, AdaptationBuilder] = {"transfer": _transfer}


def names_of_methods(source: str) -> list[str]:
    """The methods that there are for tasks of this source."""
    if source in CURVES:
        return [*OPTIMIZATION, *(ORACLES if source == "linear" else ())]
    return [*METRIC, *OPTIMIZATION, *BY_CLASS]


def all_names() -> list[str]:
    """Every method that there is for some tasks."""
    return [*METRIC, *OPTIMIZATION, *BY_CLASS, *ORACLES]


def most_ways(config: FewShotConfig) -> int | None:
    """Classes that a task can have for the method; None: any number, as the support set shows.

    What ends in a head with a number for each class has as many as its tasks in use.
    """
    any_number = config.method in METRIC and config.method != "snail"
    return None if any_number or config.task.source in CURVES else config.task.way


def made(config: FewShotConfig, images: LabelledImages | None = None) -> FewShotMethod:
    """The method that a configuration names, not yet trained.

    Raises:
        ValueError: there is no such method for such tasks, and the message lists the names; or it
            cannot be trained on tasks of so many classes.
    """
    names = names_of_methods(config.task.source)
    if config.method not in names:
        raise ValueError(
            f"no such method for tasks of {config.task.source!r}; expected one of "
            f"{', '.join(names)}, found {config.method!r}; choose one of them"
        )
    ways, trained = most_ways(config), config.trained_on.way
    if ways is not None and trained > ways and config.method not in BY_CLASS:
        raise ValueError(
            f"{config.method} has one number for each class; expected at most as many ways in "
            f"training as in use ({ways}), found {trained}; lower --training.way (0: as in use) "
            "or raise --way"
        )
    if config.method in METRIC and images is not None:
        return METRIC[config.method](config, images)
    return {**OPTIMIZATION, **BY_CLASS, **ORACLES}[config.method](config, images)
