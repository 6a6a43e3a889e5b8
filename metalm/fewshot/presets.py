"""Every setting of a few-shot experiment, and what the literature or our own search chose for each.

A preset is made for a method and a task; any setting can be overridden on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from metalm.fewshot.networks import Pooling, Statistics
from metalm.fewshot.sources import TaskConfig, TaskShape


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The encoder of pictures: four convolutions."""

    width: int = 64
    """Maps of each layer."""
    pooling: Pooling = "max"
    """Maxima of 2 x 2, or strides of 2."""
    statistics: Statistics = "running"
    """Whose statistics batch normalisation uses when queries are answered."""


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """How a method of inner updates adapts to a task."""

    rate: float = 0.1
    """Of gradient descent on the mean loss of the support; where Meta-SGD's begin."""
    steps: int = 5
    """Updates in meta-training."""
    test_steps: int = 10
    """Updates in use."""
    order: Literal[1, 2] = 2
    """Of the meta-gradient."""
    together: int = 1
    """Tasks learnt side by side; 0 for all of a batch. It changes no result."""
    adam: bool = False
    """Whether Reptile's and transfer's steps are Adam's rather than gradient descent."""
    batch: int = 0
    """Items of Reptile's inner minibatches; 0: the whole support set."""
    test_batch: int = 0
    """The same in use."""


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


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How the trained method is scored."""

    tasks: int = 1000
    """Test tasks, drawn with a seed of their own."""
    updates: tuple[int, ...] = ()
    """For methods of inner updates: further numbers of updates to score after."""


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

    @property
    def trained_on(self) -> TaskShape:
        """Size of a task in meta-training."""
        task, training = self.task, self.training
        return TaskShape(
            training.way or task.way, training.shot or task.shot, training.query or task.query
        )


def preset(method: str, source: str = "glyphs", way: int = 5, shot: int = 1) -> FewShotConfig:
    """The settings to begin with, for a method and a task.

    Prototypical networks train on more ways than they are used with, 5 queries of each (Snell et
    al. 2017, table 4); relation networks and SNAIL on tasks like those in use, relation networks
    with more queries (Sung et al. 2018).

    Args:
        method: name of a method.
        source: as in `TaskConfig`.
        way: classes of a task.
        shot: support items of a class.
    """
    task = TaskConfig(source=source, way=way, shot=shot, query=100 if source == "sine" else 15)
    config = FewShotConfig(method=method, task=task)
    training, adaptation = config.training, config.adaptation
    network = config.network
    if method in ("prototypical", "matching"):
        training = replace(training, tasks=1, way=60, query=5)
    elif method.startswith("siamese"):
        training = replace(training, tasks=1, way=30, shot=2, query=3)
    elif method == "relation":
        training = replace(training, tasks=1, query=19 if way <= 5 else 10, clip=0.5)
    elif method == "snail":
        training = replace(training, tasks=16, query=1)
    elif source != "sine":
        network = replace(network, statistics="transductive")
        training, adaptation = _adapting(method, training, adaptation)
    if source == "sine":
        training, adaptation = _on_curves(method, training, adaptation)
    return replace(config, training=training, adaptation=adaptation, network=network)


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
        return (
            replace(training, tasks=1, way=60, shot=1, query=2),
            replace(adaptation, rate=0.01, test_steps=50, adam=True),
        )
    if method == "from-scratch":
        return replace(training, steps=1), replace(adaptation, rate=1e-3, test_steps=50)
    if method == "lstm-meta-learner":
        return replace(training, clip=0.25), replace(adaptation, steps=8, test_steps=8)
    return training, replace(adaptation, rate=0.4, steps=1 if method == "meta-sgd" else 5)


def _on_curves(
    method: str, training: MetaTrainingConfig, adaptation: AdaptationConfig
) -> tuple[MetaTrainingConfig, AdaptationConfig]:
    """Methods of inner updates on sine curves (Finn et al. 2017, section 5.1)."""
    training = replace(training, steps=70_000, tasks=25, shot=10, query=10, clip=0.0)
    adaptation = replace(adaptation, rate=0.01, steps=1, test_steps=10, together=0)
    if method == "reptile":
        training = replace(training, steps=30_000, tasks=1, rate=0.1)
        adaptation = replace(adaptation, rate=0.02, steps=5, together=1)
    elif method == "from-scratch":
        training = replace(training, steps=1)
        adaptation = replace(adaptation, rate=1e-2)
    return training, adaptation
