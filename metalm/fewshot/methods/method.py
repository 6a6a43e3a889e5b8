"""What every few-shot method does: give a meta-gradient, and answer queries from a support set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from metalm.fewshot.tasks.episodes import Episode


class MetaStep(NamedTuple):
    """What one meta-gradient measured, over all tasks of the episode.

    Attributes:
        loss: mean meta-loss of a task, in the method's own unit.
        score: share of queries answered rightly, in [0, 1]; for regression, mean squared error of
            the query values.
    """

    loss: float
    score: float


class FewShotMethod(nn.Module, ABC):
    """A way to learn how to learn from few examples.

    Attributes:
        statistics: whose statistics batch normalisation uses when queries are answered:
            "transductive" (of the inputs that are answered together), "support" (of the support
            set and one query at a time), "running" (of the meta-training), or "none" (there is no
            batch normalisation). Stands beside every result.
    """

    statistics: str

    @abstractmethod
    def meta_gradient(self, episode: Episode) -> MetaStep:
        """Adds the gradient of the mean meta-loss of the tasks to `.grad` of the parameters."""

    @abstractmethod
    def predict(
        self, support_inputs: Tensor, support_targets: Tensor, query_inputs: Tensor
    ) -> Tensor:
        """Answers the queries; a task's answers do not depend on the tasks beside it.

        The mode of the module (training or evaluation) is left as it was.

        Args:
            support_inputs: [tasks, way * shot, ...].
            support_targets: [tasks, way * shot].
            query_inputs: [tasks, way * query, ...].

        Returns:
            Logits [tasks, queries, way], without a gradient; for regression, values in the form of
            the query targets.
        """


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """The module and its parts are in evaluation mode inside, and as they were after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of queries whose largest logit [..., way] is at their target [...]."""
    return float((logits.argmax(-1) == targets).double().mean())
