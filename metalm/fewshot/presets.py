"""Every setting of a few-shot experiment, and what the literature or our own search chose for each.

A preset is made for a method and a task; any setting can be overridden on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from metalm.fewshot.methods.networks import Pooling, Statistics
from metalm.fewshot.methods.reptile import refuse_no_steps
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.sources import CURVES, TaskConfig, TaskShape, classes_of
from metalm.training.checked_settings import refuse_below, refuse_outside


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The encoder of pictures: four convolutions, unless said otherwise."""

    width: int = 64
    """Maps of each layer."""
    late_width: int = 0
    """Maps from the third layer on; 0: as many as of the others."""
    pooling: Pooling = "max"
    """Maxima of 2 x 2, or strides of 2."""
    depth: int = 4
    """Layers."""
    halvings: int = 4
    """Layers that halve the pictures' sides so, the first ones."""
    reach: int = 1
    """Places of the last maps over which prototypical-elastic looks for a likeness."""
    statistics: Statistics = "running"
    """Whose statistics batch normalisation uses when queries are answered."""

    def __post_init__(self) -> None:
        """Checks sizes and shares."""
        refuse_below(self, "network", "width", "depth")
        refuse_below(self, "network", "late_width", "halvings", "reach", least=0)


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """How a method of inner updates adapts to a task."""

    rate: float = 0.1
    """Of gradient descent on the mean loss of the support; where Meta-SGD's begin."""
    steps: int = 5
    """Updates in meta-training."""
    test_steps: int = 10
    """Updates in use."""
    step_weights: tuple[float, ...] = ()
    """What the query loss after each of the steps of meta-training weighs; none: the last alone."""
    order: Literal[1, 2] = 2
    """Of the meta-gradient."""
    together: int = 1
    """Tasks learnt side by side; 0 for all of a batch. It changes no result."""
    checkpoints: Literal["none", "auto", "least"] = "none"
    """Less memory in meta-training, for updates that are taken again
    (`metalm/meta/segment_length.py`); it changes no result but for rounding."""
    adam: bool = False
    """Whether Reptile's and transfer's steps are Adam's rather than gradient descent."""
    batch: int = 0
    """Items of Reptile's inner minibatches; 0: the whole support set."""
    test_batch: int = 0
    """The same in use."""
    bfloat16: bool = False
    """Whether Reptile takes the convolutions of its training in bfloat16 where that is quicker."""

    def __post_init__(self) -> None:
        """Checks sizes and rates."""
        sizes = ("steps", "test_steps", "together", "batch", "test_batch")
        refuse_below(self, "adaptation", *sizes, least=0)
        refuse_outside(self, "adaptation", "rate", high=math.inf)


@dataclass(frozen=True, kw_only=True)
class MetaTrainingConfig:
    """The outer training."""

    steps: int = 2000
    """Of the outer optimiser."""
    tasks: int = 4
    """In a batch."""
    way: int = 0
    """Classes of a task while training; 0: as in use."""
    shot: int = 0
    """Likewise support items of a class."""
    query: int = 0
    """Likewise queries of a class."""
    rate: float = 1e-3
    """Of Adam; of plain steps for Reptile."""
    halve_every: int = 0
    """Steps after which the rate is halved; 0: it falls to zero along a half cosine."""
    clip: float = 10.0
    """Highest norm of the meta-gradient; 0 for none."""

    def __post_init__(self) -> None:
        """Checks sizes and shares."""
        refuse_below(self, "training", "tasks")
        sizes = ("steps", "way", "shot", "query", "halve_every")
        refuse_below(self, "training", *sizes, least=0)
        refuse_outside(self, "training", "rate", "clip", high=math.inf)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How the trained method is scored."""

    tasks: int = 1000
    """Test tasks, drawn with a seed of their own."""
    updates: tuple[int, ...] = ()
    """For methods of inner updates: further numbers of updates to score after."""

    def __post_init__(self) -> None:
        if self.tasks < 2:
            raise ValueError(
                "too few test tasks for an interval; expected --scoring.tasks of at least 2, found "
                f"{self.tasks}; ask for more"
            )
        if any(number < 0 for number in self.updates):
            raise ValueError(
                "impossible numbers of updates; expected --scoring.updates of at least 0, found "
                f"{', '.join(map(str, self.updates))}; change them"
            )


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """One few-shot experiment, from tasks to results."""

    method: str = "prototypical"
    """Name of a method (see `METHODS`)."""
    seed: int = 1
    """Of everything random."""
    device: str = "cpu"
    """Where tensors live, such as cpu or cuda."""
    threads: int = 0
    """Processor threads; 0 leaves torch's own choice."""
    root: str = "data"
    """Folder for prepared pictures."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What the tasks are."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The encoder (not for sine)."""
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    """For methods of inner updates."""
    training: MetaTrainingConfig = field(default_factory=MetaTrainingConfig)
    """The outer training."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """The test."""

    def __post_init__(self) -> None:
        """Checks sizes and shares."""
        refuse_below(self, "", "threads", least=0)
        if self.method == "reptile":
            refuse_no_steps(self.adaptation.steps)

    @property
    def trained_on(self) -> TaskShape:
        """Size of a task in meta-training."""
        task, training = self.task, self.training
        return TaskShape(
            training.way or task.way, training.shot or task.shot, training.query or task.query
        )


# Outer steps that take from 13 to 30 minutes on one core with 28 x 28 pixels; EXPERIMENTS.md has
# those that were measured.
_STEPS_OF_HALF_AN_HOUR = {
    "prototypical": 4500,
    "prototypical-elastic": 3000,
    "matching": 4500,
    "siamese-pairs": 9000,
    "siamese-contrastive": 9000,
    "siamese-triplet": 9000,
    "relation": 10_000,
    "snail": 6500,
    "maml": 4500,
    "meta-sgd": 4500,
    "anil": 4500,
    "reptile": 3200,
    "lstm-meta-learner": 1500,
    "transfer": 9000,
}
# The same for more than so many ways, where a step takes longer.
_FEW_WAYS = 5
_STEPS_OF_MANY_WAYS = {"relation": 4000, "maml": 1500, "meta-sgd": 2000, "anil": 2000}
# Before any update, and when the literature reports (Finn et al. 2017, table 2).
_CURVE_UPDATES = (0, 1, 5, 10)
# Meta-training for straight lines, which are learnt in a fraction of the steps for sine curves.
_STEPS_ON_LINES = 10_000
_RATE_ON_LINES = 0.05  # of 0.01, 0.05 and 0.2, on validation lines (EXPERIMENTS.md)


def preset(method: str, source: str = "glyphs", way: int = 5, shot: int = 1) -> FewShotConfig:
    """The settings to begin with, for a method and a task.

    Prototypical networks train on more ways than they are used with, 5 queries of each (Snell et
    al. 2017, table 4); with the elastic distance they have six layers, which keep 7 x 7 places of
    28 x 28 pixels (EXPERIMENTS.md). Relation networks and SNAIL train on tasks like those in use,
    relation networks with more queries (Sung et al. 2018). Drawn glyphs are learnt in minutes; for
    other pictures there are as many steps as fit into half an hour on one core.

    Args:
        method: name of a method.
        source: as in `TaskConfig`.
        way: classes of a task.
        shot: support items of a class.
    """
    task = TaskConfig(source=source, way=way, shot=shot, query=100 if source in CURVES else 15)
    config = FewShotConfig(method=method, task=task)
    training, adaptation = config.training, config.adaptation
    network, scoring = config.network, config.scoring
    if method in ("prototypical", "prototypical-elastic", "matching"):
        training = replace(training, tasks=1, way=60, query=5)
        if method == "prototypical-elastic":
            network = replace(network, halvings=2, depth=6)
    elif method.startswith("siamese"):
        training = replace(training, tasks=1, way=30, shot=2, query=3)
    elif method == "relation":
        query = 19 if way <= _FEW_WAYS else 10
        training = replace(training, tasks=1, query=query, clip=0.5)
    elif method == "snail":
        training = replace(training, tasks=16, query=1)
    elif source not in CURVES:
        network = replace(network, statistics="transductive")
        training, adaptation = _adapting(method, training, adaptation)
    if source in CURVES:
        training, adaptation = _on_curves(method, training, adaptation)
        if source == "linear":
            training = replace(training, steps=min(_STEPS_ON_LINES, training.steps))
            if method in ("maml", "anil", "meta-sgd"):
                adaptation = replace(adaptation, rate=_RATE_ON_LINES)
        updates = tuple(n for n in _CURVE_UPDATES if n <= adaptation.test_steps)
        scoring = replace(scoring, updates=updates)
    config = replace(
        config, training=training, adaptation=adaptation, network=network, scoring=scoring
    )
    return config if source in (*CURVES, "glyphs") else _at_length(config)


def within_classes(config: FewShotConfig, images: LabelledImages | None) -> FewShotConfig:
    """The settings with no more ways in training than there are classes to learn from.

    Where the classes of a task come from one group, with no more than in use.

    Presets train on many ways, as the literature does on Omniglot; a folder of pictures may have
    fewer classes.

    Args:
        config: a preset's.
        images: the pictures; None for curves, which have no classes.

    Raises:
        ValueError: the pictures have no official split, or no class is left to learn from.
    """
    if images is None:
        return config
    classes = classes_of(config.task, "train", config.seed, images)
    if config.task.within_groups:
        # A group has few classes, and one of as many ways as in use is there or refused by name.
        classes = min(classes, config.task.way)
    if config.training.way <= classes:
        return config
    return replace(config, training=replace(config.training, way=classes))


def _adapting(
    method: str, training: MetaTrainingConfig, adaptation: AdaptationConfig
) -> tuple[MetaTrainingConfig, AdaptationConfig]:
    """Methods of inner updates on pictures."""
    if method == "reptile":
        return (
            replace(training, tasks=5, shot=10, query=1, rate=1.0, clip=0.0),
            replace(
                adaptation, rate=1e-3, steps=5, test_steps=50, adam=True, batch=10, test_batch=5
            ),
        )
    if method in ("transfer", "multi-task"):
        # Transfer tells all classes apart; multi-task has one number for each class of a task.
        way = 60 if method == "transfer" else 0
        return (
            replace(training, tasks=1, way=way, shot=1, query=2),
            replace(adaptation, rate=0.01, test_steps=50, adam=True),
        )
    if method == "from-scratch":
        return replace(training, steps=1), replace(adaptation, rate=1e-3, test_steps=50)
    if method == "lstm-meta-learner":
        return replace(training, clip=0.25), replace(adaptation, steps=8, test_steps=8)
    if method == "meta-sgd":
        return training, replace(adaptation, rate=0.4, steps=1, test_steps=1)
    return training, replace(adaptation, rate=0.4, steps=5)


def _at_length(config: FewShotConfig) -> FewShotConfig:
    """The published networks and updates for Omniglot, in as many steps as there is time for.

    MAML's network halves the pictures by strides (Finn et al. 2017, appendix A.1), at a third of
    the cost of maxima; MAML takes 1 update in training and 3 in use, for 20 ways 5. Their 32 and 16
    tasks a step and 60,000 steps do not fit: here it is half of the tasks, and 5 queries a class
    where they have one. Reptile's authors have strides, too; with maxima it needs a tenth of the
    tasks (EXPERIMENTS.md).
    """
    method, training, adaptation = config.method, config.training, config.adaptation
    network, few = config.network, config.task.way <= _FEW_WAYS
    steps = _STEPS_OF_HALF_AN_HOUR.get(method, training.steps)
    if not few:
        steps = _STEPS_OF_MANY_WAYS.get(method, steps)
    training = replace(training, steps=steps)
    if method in ("maml", "anil", "meta-sgd"):
        network = replace(network, pooling="stride")
        training = replace(training, tasks=16 if few else 8, query=5)
        adaptation = replace(adaptation, together=0)
    if method in ("maml", "anil"):
        taken, used = (1, 3) if few else (3, 5)
        adaptation = replace(adaptation, steps=taken, test_steps=used)
    if method == "reptile":
        # The published rate, 1e-3, learns more slowly where steps are few (EXPERIMENTS.md).
        adaptation = replace(adaptation, rate=3e-3, together=0, bfloat16=True)
        if not few:
            training = replace(training, steps=1000)
            adaptation = replace(adaptation, rate=5e-4, steps=10, batch=20, test_batch=10)
    if method == "relation" and not few:
        training = replace(training, query=5)
    return replace(config, network=network, training=training, adaptation=adaptation)


def _on_curves(
    method: str, training: MetaTrainingConfig, adaptation: AdaptationConfig
) -> tuple[MetaTrainingConfig, AdaptationConfig]:
    """Methods of inner updates on sine curves (Finn et al. 2017, section 5.1).

    What learns its own steps is used for as many of them as it was trained for: rates that were
    learned for one update go too far, or the wrong way, at the second. Meta-SGD takes one as in
    its paper (Li et al. 2017, section 4.1). MAML learns from as many points as in use, and counts
    the queries after each of two updates, mostly after the first, as validation curves chose
    (EXPERIMENTS.md); its paper trains one update from ten points.
    """
    training = replace(training, steps=70_000, tasks=25, shot=10, query=10, clip=0.0)
    adaptation = replace(adaptation, rate=0.01, steps=1, test_steps=10, together=0)
    if method == "maml":
        training = replace(training, shot=0)
        adaptation = replace(adaptation, steps=2, step_weights=(0.8, 0.2))
    elif method == "reptile":
        training = replace(training, steps=30_000, tasks=1, rate=0.1)
        adaptation = replace(adaptation, rate=0.02, steps=5, together=1)
    elif method == "from-scratch":
        training = replace(training, steps=1)
        adaptation = replace(adaptation, rate=1e-2)
    elif method == "meta-sgd":
        adaptation = replace(adaptation, test_steps=1)
    elif method == "lstm-meta-learner":
        training = replace(training, steps=15_000, clip=0.25)
        adaptation = replace(adaptation, steps=5, test_steps=5)
    return training, adaptation
