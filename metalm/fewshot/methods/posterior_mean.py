"""The oracle for straight lines: what no method can honestly beat."""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.fewshot.methods.method import FewShotMethod, MetaStep
from metalm.fewshot.tasks.episodes import Episode
from metalm.fewshot.tasks.linear import bayes_answers


class PosteriorMean(FewShotMethod):
    """Ridge regression on the support points, with the penalty that the tasks are drawn by.

    It is told how they are drawn, learns nothing between tasks and has no parameters.

    Args:
        ridge: noise^2 / spread^2 of the tasks (`tasks/linear.py`).
    """

    def __init__(self, ridge: float) -> None:
        super().__init__()
        self.ridge, self.statistics = ridge, "none"

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """No gradient; the mean squared error of the query values, twice."""
        answers = self.predict(
            episode.support_inputs, episode.support_targets, episode.query_inputs
        )
        error = float((answers - episode.query_targets).square().mean())
        return MetaStep(error, error)

    @torch.no_grad()
    def predict(
        self, support_inputs: Tensor, support_targets: Tensor, query_inputs: Tensor
    ) -> Tensor:
        """The posterior mean at the queries; see `bayes_answers`."""
        return bayes_answers(support_inputs, support_targets, query_inputs, ridge=self.ridge)
