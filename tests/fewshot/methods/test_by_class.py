import math

import pytest
import torch

from metalm.fewshot.methods.by_class import class_best, class_logsumexp, class_means, class_sums

GENERATOR = torch.Generator().manual_seed(0)
TARGETS = torch.tensor([[2, 0, 1, 2, 0], [0, 1, 1, 2, 1]])


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4,), (4, 3, 2)])
def test_sums_and_means_by_loops(shape):
    features = random(2, 5, *shape)
    sums, means = class_sums(features, TARGETS), class_means(features, TARGETS)
    for task in range(2):
        for number in range(3):
            own = [features[task, i] for i in range(5) if TARGETS[task, i] == number]
            torch.testing.assert_close(sums[task, number], sum(own))
            torch.testing.assert_close(means[task, number], sum(own) / len(own))


def test_best_and_logsumexp_by_loops():
    scores = random(2, 7, 5)
    best, soft = class_best(scores, TARGETS), class_logsumexp(scores, TARGETS)
    for task in range(2):
        for query in range(7):
            for number in range(3):
                own = [
                    float(scores[task, query, i]) for i in range(5) if TARGETS[task, i] == number
                ]
                assert float(best[task, query, number]) == max(own)
                expected = math.log(sum(math.exp(score) for score in own))
                assert float(soft[task, query, number]) == pytest.approx(expected, abs=1e-12)


def test_far_scores_keep_their_gradient():
    # exp(-1000) is zero: a softmax followed by a logarithm would have no way back.
    scores = torch.tensor([[[0.0, -1000.0]]], requires_grad=True)
    logits = class_logsumexp(scores, torch.tensor([[0, 1]]))
    torch.nn.functional.cross_entropy(logits[0], torch.tensor([1])).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[[1.0, -1.0]]]))
