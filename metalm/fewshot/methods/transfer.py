"""Transfer: ordinary training on the classes of meta-training, then fine-tuning on the support."""

from __future__ import annotations

from typing import Any

from torch import nn

from metalm.fewshot.methods.adaptation import Adaptation, task_loss
from metalm.fewshot.methods.method import MetaStep
from metalm.fewshot.methods.multi_task import pooled
from metalm.fewshot.methods.networks import Classifier, Conv4, FullyConnected
from metalm.fewshot.tasks.episodes import Episode
from metalm.meta.module_fork import Fork, fork
from metalm.meta.rules import Adam, GradientDescent


class Transfer(Adaptation):
    """A body trained to tell all classes of meta-training apart; a new head for every task.

    Episodes for the training name their items by the classes of the meta-training set, from 0 to
    below ``classes``, rather than by their place in the task: the loss is the cross-entropy of all
    items among all classes. In use the head is replaced by zeros for the task's classes, and learns
    from the support set, with the body or alone. (The baseline of Ravi and Larochelle 2017, section
    5; of Chen et al. 2019, arXiv 1904.04232, where the head learns alone.)

    Args:
        body: makes features of pictures.
        classes: in meta-training.
        way: classes of a task.
        rate: of the steps in use.
        head_only: whether the body stays as it was trained.
        adam: whether the steps are Adam's rather than gradient descent.
        **options: see `Adaptation`; steps and order play no part.

    Raises:
        ValueError: in meta-training, a target beyond the classes.
    """

    def __init__(
        self,
        body: Conv4 | FullyConnected,
        *,
        classes: int,
        way: int,
        rate: float,
        head_only: bool = False,
        adam: bool = False,
        **options: Any,
    ) -> None:
        network = Classifier(body, way)
        super().__init__(network, **options, steps=0)
        nn.init.zeros_(network.head.weight)
        nn.init.zeros_(network.head.bias)
        self._body = [body]  # in a list, or it would be registered twice
        self.head_only = head_only
        self.all_classes = nn.Linear(body.num_features, classes)
        self.rule = Adam(rate) if adam else GradientDescent(rate)

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """The gradient of the mean loss of all items among all classes."""
        inputs, targets = pooled(episode)
        classes = self.all_classes.out_features
        if targets.is_floating_point() or int(targets.max()) >= classes:
            raise ValueError(
                "these targets are no classes of the meta-training set; expected integers below "
                f"{classes}, found {float(targets.max()):g}; do give episodes that name their "
                "items by these classes"
            )
        network = nn.Sequential(*self._body, self.all_classes)
        loss, score = task_loss(network, (inputs, targets))
        if loss.requires_grad:
            loss.backward()
        return MetaStep(loss.item(), score.item())

    def start(self, tasks: int | None) -> Fork:
        """The trained body and a head of zeros."""
        return fork(self.network, ["head.*"] if self.head_only else None, tasks=tasks)
