"""What is particular to each metric method, by loops."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from metalm.fewshot.methods.matching import Matching
from metalm.fewshot.methods.prototypical import Prototypical
from metalm.fewshot.methods.relation import Relation, RelationEncoder
from metalm.fewshot.methods.siamese import Siamese, contrastive_loss, pair_loss, triplet_loss

GENERATOR = torch.Generator().manual_seed(0)
TARGETS = torch.tensor([[1, 0, 2, 1, 0, 2, 2], [0, 0, 1, 2, 1, 2, 0]])
SAME = torch.tensor([[1, 2, 0, 1], [0, 2, 2, 1]]).unsqueeze(2) == TARGETS.unsqueeze(1)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


SUPPORT, QUERY = random(2, 7, 5), random(2, 4, 5)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def test_prototypes_by_loops():
    method = Prototypical(nn.Identity(), "none")
    logits = method.answer(method.remember(SUPPORT, TARGETS), QUERY)
    found = logits.softmax(-1)
    for task in range(2):
        for query in range(4):
            weights = []
            for number in range(3):
                own = [SUPPORT[task, i] for i in range(7) if TARGETS[task, i] == number]
                centre = sum(own) / len(own)
                weights.append(math.exp(-float((QUERY[task, query] - centre).square().sum())))
            for number in range(3):
                expected = weights[number] / sum(weights)
                assert float(found[task, query, number]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_attention_by_loops(similarity):
    method = Matching(
        nn.Identity(), "none", similarity=similarity, factor=1.7, learn_factor=False
    ).double()
    logits = method.answer(method.remember(SUPPORT, TARGETS), QUERY)
    found = logits.softmax(-1)
    for task in range(2):
        for query in range(4):
            shares = [0.0, 0.0, 0.0]
            for i in range(7):
                one, other = QUERY[task, query], SUPPORT[task, i]
                score = (
                    1.7 * cosine(one, other)
                    if similarity == "cosine"
                    else -float((one - other).square().sum())
                )
                shares[int(TARGETS[task, i])] += math.exp(score)
            for number in range(3):
                expected = shares[number] / sum(shares)
                assert float(found[task, query, number]) == pytest.approx(expected, rel=1e-6)


def test_the_factor_of_the_cosine_is_learnt_where_it_is_said_so():
    def names(**changes):
        return [name for name, _ in Matching(nn.Identity(), "none", **changes).named_parameters()]

    assert names() == ["log_factor"]
    assert names(learn_factor=False) == names(similarity="euclidean") == []
    # A factor of 1 leaves a class of twenty at most e / (e + 19 / e).
    method = Matching(nn.Identity(), "none", factor=1.0, learn_factor=False)
    support = torch.cat([torch.ones(1, 1), -torch.ones(19, 1)])[None]
    logits = method.answer(method.remember(support, torch.arange(20)[None]), torch.ones(1, 1, 1))
    assert float(logits.softmax(-1).max()) == pytest.approx(math.e / (math.e + 19 / math.e))


def test_pair_loss_by_loops():
    logits = random(2, 4, 7)
    losses = {True: [], False: []}
    for place, same in zip(logits.flatten().tolist(), SAME.flatten().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-place))
        losses[same].append(-math.log(probability if same else 1 - probability))
    expected = sum(sum(each) / len(each) for each in losses.values()) / 2
    assert float(pair_loss(logits, SAME)) == pytest.approx(expected)


def test_contrastive_loss_by_loops():
    squared = 3 * random(2, 4, 7).square()
    losses = {True: [], False: []}
    for place, same in zip(squared.flatten().tolist(), SAME.flatten().tolist(), strict=True):
        losses[same].append((place if same else max(0, 1.3 - math.sqrt(place)) ** 2) / 2)
    assert 0 in losses[False]
    expected = sum(sum(each) / len(each) for each in losses.values()) / 2
    assert float(contrastive_loss(squared, SAME, 1.3)) == pytest.approx(expected)


def test_contrastive_loss_has_a_gradient_where_pictures_coincide():
    squared = torch.zeros(2, 4, 7, requires_grad=True)
    contrastive_loss(squared, SAME, 1.0).backward()
    assert squared.grad.isfinite().all()


def test_triplet_loss_by_loops():
    squared = random(2, 4, 7).square()
    means = []
    for task in range(2):
        losses = []
        for anchor in range(4):
            for positive in range(7):
                for negative in range(7):
                    same = SAME[task, anchor]
                    if same[positive] and not same[negative]:
                        d = squared[task, anchor]
                        losses.append(max(0.0, float(d[positive] - d[negative]) + 0.2))
        active = [loss for loss in losses if loss > 0]
        assert 0 < len(active) < len(losses)
        means.append(sum(active) / len(active))
    assert float(triplet_loss(squared, SAME, 0.2)) == pytest.approx(sum(means) / 2)


def test_triplet_loss_is_zero_when_all_is_well():
    squared = torch.where(SAME, 0.0, 1.0).requires_grad_()
    loss = triplet_loss(squared, SAME, 0.2)
    loss.backward()
    assert loss.item() == 0
    assert not squared.grad.any()


@pytest.mark.parametrize("objective", ["pairs", "contrastive", "triplet"])
def test_likeness_by_loops(objective):
    torch.manual_seed(0)
    method = Siamese(nn.Identity(), "none", objective=objective, num_features=5, units=6).double()
    found = method.answer(method.remember(SUPPORT, TARGETS), QUERY)
    for task in range(2):
        for query in range(4):
            best = [-math.inf] * 3
            for i in range(7):
                one, other = QUERY[task, query], SUPPORT[task, i]
                if objective == "pairs":
                    distance = (method.units(one).sigmoid() - method.units(other).sigmoid()).abs()
                    score = (method.judge.weight[0] @ distance + method.judge.bias[0]).item()
                elif objective == "contrastive":
                    score = -float((one - other).square().sum())
                else:
                    score = 2 * cosine(one, other) - 2  # of vectors of length 1
                number = int(TARGETS[task, i])
                best[number] = max(best[number], score)
            torch.testing.assert_close(found[task, query].tolist(), best)


def test_pairs_need_the_number_of_features():
    with pytest.raises(ValueError, match="expected the number of features of the encoder"):
        Siamese(nn.Identity(), "none", objective="pairs")


def test_the_published_maps_of_the_relation_encoder():
    encoder = RelationEncoder(statistics="running").eval()
    assert encoder(torch.rand(2, 1, 28, 28)).shape == (2, 64, 5, 5)


def test_relations_by_loops():
    torch.manual_seed(0)
    method = Relation(channels=2, size=26, width=3, statistics="running").double().eval()
    targets = torch.tensor([[1, 0, 2, 1], [0, 2, 1, 2]])
    support, query = random(2, 4, 2, 26, 26), random(2, 5, 2, 26, 26)
    found = method.answer(method.remember(support, targets), query)
    for task in range(2):
        for q in range(5):
            for number in range(3):
                own = [
                    method.encoder(support[task, i : i + 1])
                    for i in range(4)
                    if targets[task, i] == number
                ]
                pair = torch.cat([sum(own), method.encoder(query[task, q : q + 1])], 1)
                torch.testing.assert_close(found[task, q, number], method.head(pair)[0])


def test_the_relation_loss_by_loops():
    method = Relation(size=22, width=2, statistics="running")
    logits, targets = random(2, 4, 3), torch.tensor([[1, 2, 0, 1], [0, 2, 2, 1]])
    errors = [
        (1 / (1 + math.exp(-float(logits[t, q, k]))) - (int(targets[t, q]) == k)) ** 2
        for t in range(2)
        for q in range(4)
        for k in range(3)
    ]
    assert method.loss(logits, targets).item() == pytest.approx(sum(errors) / len(errors))


def test_a_relation_network_refuses_small_pictures():
    with pytest.raises(ValueError, match="expected at least 22 pixels, found 21"):
        Relation(size=21, statistics="running")
    assert Relation(size=22, width=2, statistics="running")


def test_the_default_loss_is_cross_entropy():
    logits, targets = random(2, 4, 3), torch.tensor([[1, 2, 0, 1], [0, 2, 2, 1]])
    expected = [
        functional.cross_entropy(logits[t, q : q + 1], targets[t, q : q + 1])
        for t in range(2)
        for q in range(4)
    ]
    found = Prototypical(nn.Identity(), "none").loss(logits, targets)
    torch.testing.assert_close(found, sum(expected) / 8)
