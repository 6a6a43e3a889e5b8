"""How well a method answers: mean over test tasks, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from metalm.fewshot.methods.adaptation import Adaptation
from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.tasks.episodes import Episode, EpisodeSource

_QUANTILE = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks.

    Attributes:
        mean: of the tasks' scores.
        margin: half of the 95 % interval, 1.96 standard errors over tasks (as Finn et al. 2017).
        tasks: how many there were.
    """

    mean: float
    margin: float
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.margin:.4f}"


def estimate(scores: Sequence[float]) -> Estimate:
    """Mean and margin of independent scores.

    Raises:
        ValueError: there are fewer than two.
    """
    count = len(scores)
    if count < 2:
        raise ValueError(
            f"an interval needs tasks; expected at least 2 scores, found {count}; ask for more"
        )
    mean = math.fsum(scores) / count
    variance = math.fsum((score - mean) ** 2 for score in scores) / (count - 1)
    return Estimate(mean, _QUANTILE * math.sqrt(variance / count), count)


def task_scores(
    method: FewShotMethod,
    source: EpisodeSource,
    tasks: int,
    *,
    at_once: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The score of every task: share of right answers, or mean squared error for regression.

    Args:
        method: answers; nothing of the queries but their inputs is shown to it.
        source: of the tasks.
        tasks: how many.
        at_once: tasks answered together; the scores do not depend on it.
        device: where the tasks go.
        progress: told the number of tasks after each batch.
    """
    scores: list[float] = []
    for episode in _episodes(source, tasks, at_once, device, progress):
        answers = method.predict(
            episode.support_inputs, episode.support_targets, episode.query_inputs
        )
        scores += score_of_answers(answers, episode.query_targets).tolist()
    return scores


def scores_after(
    method: Adaptation,
    updates: Sequence[int],
    source: EpisodeSource,
    tasks: int,
    *,
    at_once: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[int, list[float]]:
    """The scores of `task_scores` after each of these numbers of updates, on the same tasks.

    Args:
        method: learns each task once, and answers on the way.
        updates: how many were made when queries are answered; ``method.test_steps`` gives the
            numbers of `task_scores`.
        source: see `task_scores`, as the rest.
        tasks: how many.
        at_once: tasks answered together.
        device: where the tasks go.
        progress: told the number of tasks after each batch.
    """
    wanted = sorted(set(updates))
    scores: dict[int, list[float]] = {number: [] for number in wanted}
    for episode in _episodes(source, tasks, at_once, device, progress):
        answers = method.answers_after(
            wanted, episode.support_inputs, episode.support_targets, episode.query_inputs
        )
        for number, own in zip(wanted, answers, strict=True):
            scores[number] += score_of_answers(own, episode.query_targets).tolist()
    return scores


def _episodes(
    source: EpisodeSource,
    tasks: int,
    at_once: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None,
) -> Iterator[Episode]:
    """So many tasks, told of once whoever took them comes back for more."""
    for first in range(0, tasks, at_once):
        count = min(at_once, tasks - first)
        yield source.sample(count).to(device)
        if progress is not None:
            progress(count)


def score_of_answers(answers: Tensor, targets: Tensor) -> Tensor:
    """Score of each task, float64 [tasks].

    Args:
        answers: logits [tasks, queries, way], or values in the form of the targets.
        targets: classes [tasks, queries], or values [tasks, queries, outputs].
    """
    if targets.is_floating_point():
        return (answers - targets).double().square().flatten(1).mean(1)
    return (answers.argmax(-1) == targets).double().mean(1)
