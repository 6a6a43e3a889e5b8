"""Training on the support set alone, from weights that have seen nothing: the lower baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metalm.fewshot.methods.adaptation import Adaptation
from metalm.fewshot.methods.method import MetaStep
from metalm.fewshot.tasks.episodes import Episode
from metalm.meta.rules import Adam


class FromScratch(Adaptation):
    """Steps of Adam on the support set from random weights, which are never meta-trained.

    All tasks begin at the same draw. With running statistics there would be none to run on, so
    the network must normalise by batches, or not at all.

    Args:
        network: with random weights.
        rate: of Adam.
        **options: see `Adaptation`; the order plays no part.

    Raises:
        ValueError: a network with running statistics.
    """

    def __init__(self, network: nn.Module, *, rate: float = 1e-3, **options: Any) -> None:
        super().__init__(network, order=0, **options)
        if self.statistics == "running":
            raise ValueError(
                "nothing was trained that statistics could run over; expected transductive "
                "statistics or none, found running ones; do change the network"
            )
        self.rule = Adam(rate)

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """Zeros: nothing is learnt between tasks; the score is measured all the same."""
        for tensor in self.parameters():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return super().meta_gradient(episode)
