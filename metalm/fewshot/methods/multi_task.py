"""One network trained on all tasks at once, as if they were one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metalm.fewshot.methods.adaptation import Adaptation, Batch, task_loss
from metalm.fewshot.methods.method import MetaStep
from metalm.fewshot.tasks.episodes import Episode
from metalm.meta.rules import GradientDescent


class MultiTask(Adaptation):
    """Least mean loss over the items of all tasks, support and queries alike, without inner steps.

    By default nothing is learnt from the support set in use: this is what tasks have in common.
    With ``test_steps`` it is the pretrained network of Finn et al. 2017, section 5.1, which is
    fine-tuned. Classes that are numbered anew in each task have no common answer, so that it stays
    at chance there.

    Args:
        network: trained.
        rate: of the steps in use, on the mean loss of the support items.
        **options: see `Adaptation`; steps and order play no part.
    """

    def __init__(self, network: nn.Module, *, rate: float = 0.0, **options: Any) -> None:
        super().__init__(network, **{"test_steps": 0, **options}, steps=0)
        self.rule = GradientDescent(rate)

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """The gradient of the mean loss over all items, as in ordinary training."""
        loss, score = task_loss(self.network, pooled(episode))
        if loss.requires_grad:
            loss.backward()
        return MetaStep(loss.item(), score.item())


def pooled(episode: Episode) -> Batch:
    """All inputs ``[items, ...]`` and targets of an episode, whatever task they are from."""
    inputs, targets, query, wanted = (each.flatten(0, 1) for each in episode)
    return torch.cat([inputs, query]), torch.cat([targets, wanted])
