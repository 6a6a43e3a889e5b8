"""One suite for all metric methods: a new one adds a row."""

import pytest
import torch
from torch import nn

from metalm.fewshot.methods.elastic_prototypical import ElasticPrototypical
from metalm.fewshot.methods.matching import Matching
from metalm.fewshot.methods.networks import Conv4, normalisation
from metalm.fewshot.methods.pixels import NearestPixels
from metalm.fewshot.methods.prototypical import Prototypical
from metalm.fewshot.methods.relation import Relation
from metalm.fewshot.methods.siamese import Siamese
from metalm.fewshot.methods.snail import Snail
from metalm.fewshot.tasks.episodes import Episode

WAY, SHOT, SIZE = 3, 2, 22


class TinyEncoder(nn.Sequential):
    """One convolution, normalised, and the means of its maps."""

    def __init__(self, statistics):
        super().__init__(
            nn.Conv2d(1, 4, 3), normalisation(4, statistics), nn.AvgPool2d(20), nn.Flatten()
        )


METHODS = {
    "prototypical": lambda s: Prototypical(TinyEncoder(s), s),
    "prototypical, elastic": lambda s: ElasticPrototypical(
        Conv4(size=SIZE, width=4, halvings=2, statistics=s), s
    ),
    "matching": lambda s: Matching(TinyEncoder(s), s),
    "matching, euclidean": lambda s: Matching(TinyEncoder(s), s, similarity="euclidean"),
    "siamese": lambda s: Siamese(TinyEncoder(s), s, objective="pairs", num_features=4, units=5),
    "contrastive": lambda s: Siamese(TinyEncoder(s), s, objective="contrastive", margin=0.3),
    "triplet": lambda s: Siamese(TinyEncoder(s), s, objective="triplet"),
    "relation": lambda s: Relation(size=SIZE, width=3, statistics=s),
    "snail": lambda s: Snail(TinyEncoder(s), s, num_features=4, way=WAY, max_shot=SHOT),
    "pixels": lambda s: NearestPixels(),
}
IN_ANY_ORDER = [name for name in METHODS if name != "snail"]


def made(name, statistics="running"):
    torch.manual_seed(0)
    return METHODS[name](statistics)


def episode(tasks=2, query=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def inputs(items):
        return torch.rand(tasks, items, 1, SIZE, SIZE, generator=generator)

    def targets(each):
        order = [torch.randperm(WAY * each, generator=generator) for _ in range(tasks)]
        return torch.arange(WAY).repeat_interleave(each)[torch.stack(order)]

    return Episode(inputs(WAY * SHOT), targets(SHOT), inputs(WAY * query), targets(query))


def in_float64(tasks):
    return Episode(*(each.double() if each.is_floating_point() else each for each in tasks))


def settled(method):
    """Running statistics that are not those of the start."""
    for part in method.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.02, 0.2)
    return method


@pytest.mark.parametrize("statistics", ["running", "transductive"])
@pytest.mark.parametrize("name", METHODS)
def test_predictions_of_a_task_do_not_depend_on_its_neighbours(name, statistics):
    method, tasks = settled(made(name, statistics)), episode(tasks=3)
    whole = method.predict(*tasks[:3])
    assert whole.shape == (3, WAY * 4, WAY)
    assert not whole.requires_grad
    for task in range(3):
        alone = method.predict(*(each[task : task + 1] for each in tasks[:3]))
        torch.testing.assert_close(alone[0], whole[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_with_running_statistics_every_query_stands_for_itself(name):
    method, tasks = settled(made(name)), episode()
    whole = method.predict(*tasks[:3])
    alone = method.predict(*tasks[:2], tasks.query_inputs[:, 5:6])
    torch.testing.assert_close(alone[:, 0], whole[:, 5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_ANY_ORDER)
def test_the_order_of_the_support_plays_no_part(name):
    method, tasks = settled(made(name)), episode()
    order = torch.randperm(WAY * SHOT)
    turned = method.predict(
        tasks.support_inputs[:, order], tasks.support_targets[:, order], tasks.query_inputs
    )
    torch.testing.assert_close(turned, method.predict(*tasks[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_ANY_ORDER)
def test_renamed_classes_rename_the_answers(name):
    method, tasks = settled(made(name)), episode()
    renamed = torch.tensor([2, 0, 1])
    found = method.predict(tasks.support_inputs, renamed[tasks.support_targets], tasks.query_inputs)
    expected = method.predict(*tasks[:3])
    torch.testing.assert_close(found[..., renamed], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_predicting_changes_nothing(name):
    method, tasks = made(name), episode()
    method.train()
    next(iter(method.children())).eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    modes = [part.training for part in method.modules()]
    method.predict(*tasks[:3])
    assert [part.training for part in method.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


@pytest.mark.parametrize("statistics", ["running", "transductive"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "pixels"])
def test_the_meta_gradient_is_that_of_the_reported_loss(name, statistics):
    """Central differences of the loss along a random direction, in float64."""
    method = made(name, statistics).double()
    tasks = in_float64(episode())
    step = method.meta_gradient(tasks)
    parameters = list(method.parameters())
    assert all(each.grad is not None for each in parameters)
    torch.manual_seed(1)
    direction = [torch.randn_like(each) for each in parameters]
    slope = sum(
        float((each.grad * way).sum()) for each, way in zip(parameters, direction, strict=True)
    )
    size = 1e-7  # few of the kinks of ReLU and of minima lie as near as that

    def loss_at(factor):
        with torch.no_grad():
            for each, way in zip(parameters, direction, strict=True):
                each.add_(factor * size * way)
            support, query = method.embed_both(tasks)
            loss, _ = method.meta_loss(support, tasks[1], query, tasks[3])
            for each, way in zip(parameters, direction, strict=True):
                each.sub_(factor * size * way)
        return float(loss)

    assert loss_at(0) == pytest.approx(step.loss, rel=1e-12)
    assert (loss_at(1) - loss_at(-1)) / (2 * size) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_many_tasks_are_the_mean_of_their_own(name):
    """Transductive, where tasks share nothing: a batch is the mean of its tasks."""
    tasks = in_float64(episode(tasks=3))
    whole, single = (made(name, "transductive").double() for _ in range(2))
    step = whole.meta_gradient(tasks)
    steps = [single.meta_gradient(Episode(*(each[t : t + 1] for each in tasks))) for t in range(3)]
    assert step.loss == pytest.approx(sum(each.loss for each in steps) / 3, rel=1e-9)
    assert step.score == pytest.approx(sum(each.score for each in steps) / 3)
    for one, other in zip(whole.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad / 3, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_the_score_is_the_share_of_right_answers(name):
    method, tasks = made(name, "transductive"), episode()
    answers = method.predict(*tasks[:3]).argmax(-1)
    right = sum(
        int(answers[t, q]) == int(tasks.query_targets[t, q]) for t in range(2) for q in range(12)
    )
    assert method.meta_gradient(tasks).score == pytest.approx(right / 24)


def test_support_and_queries_are_normalised_together_in_training():
    method, tasks = made("prototypical"), episode(tasks=1)
    encoder = method.encoder
    both = torch.cat([tasks.support_inputs[0], tasks.query_inputs[0]])
    expected = encoder(both)
    support, query = method.embed_both(tasks)
    torch.testing.assert_close(torch.cat([support[0], query[0]]), expected)
