import math
from statistics import mean, stdev

import pytest
import torch

from metalm.fewshot.scoring import estimate, score_of_answers, task_scores
from metalm.fewshot.tasks.episodes import Episode


class Counting:
    """Tasks whose number is in their inputs."""

    def __init__(self):
        self.drawn = 0

    def sample(self, count):
        numbers = torch.arange(self.drawn, self.drawn + count)
        self.drawn += count
        inputs = numbers.view(-1, 1, 1).expand(count, 4, 1).float()
        targets = torch.tensor([0, 1, 1, 0]).expand(count, 4)
        return Episode(inputs[:, :2], targets[:, :2], inputs, targets)


class RightInSome:
    """Answers `number % 5` of the four queries rightly."""

    def predict(self, support_inputs, support_targets, query_inputs):
        rights = query_inputs[:, 0, 0].long() % 5
        right = torch.arange(4) < rights.unsqueeze(1)
        targets = torch.tensor([0, 1, 1, 0])
        said = torch.where(right, targets, 1 - targets)
        return torch.nn.functional.one_hot(said, 2).double()


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_every_task_is_scored_once_whatever_the_batch(at_once):
    told = []
    found = task_scores(RightInSome(), Counting(), 11, at_once=at_once, progress=told.append)
    assert found == [(number % 5) / 4 for number in range(11)]
    assert sum(told) == 11


def test_interval_of_a_known_sample():
    scores = [0.2, 0.4, 0.9, 0.5]
    found = estimate(scores)
    assert math.isclose(found.mean, mean(scores))
    assert math.isclose(found.margin, 1.959963984540054 * stdev(scores) / 2)
    assert found.tasks == 4
    with pytest.raises(ValueError, match="expected at least 2 scores, found 1"):
        estimate([1.0])


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(2000):
        sample = torch.rand(50, generator=generator, dtype=torch.float64).tolist()
        found = estimate(sample)
        hits += abs(found.mean - 0.5) <= found.margin
    assert 0.93 < hits / 2000 < 0.97


def test_regression_is_scored_by_the_mean_squared_error():
    answers = torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]]])
    targets = torch.tensor([[[1.5], [0.0]], [[3.0], [4.0]]])
    found = score_of_answers(answers, targets)
    assert found.tolist() == [(0.25 + 4) / 2, (9 + 16) / 2]
