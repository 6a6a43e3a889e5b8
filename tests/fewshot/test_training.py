import copy

import pytest
import torch
from torch import nn

from metalm.fewshot.methods.maml import Maml
from metalm.fewshot.methods.method import FewShotMethod, MetaStep
from metalm.fewshot.methods.multi_task import MultiTask
from metalm.fewshot.methods.networks import Classifier, FullyConnected
from metalm.fewshot.methods.prototypical import Prototypical
from metalm.fewshot.methods.reptile import Reptile
from metalm.fewshot.tasks.episodes import Episode
from metalm.fewshot.tasks.sine import SineTasks
from metalm.fewshot.training import FewShotTraining
from metalm.training.loop import run


class Offset(FewShotMethod):
    """Answers with one number; its best is the mean of the query values."""

    statistics = "none"

    def __init__(self, bad_at=-1):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.calls, self.bad_at = 0, bad_at

    def meta_gradient(self, episode):
        loss = (episode.query_targets - self.offset).square().mean()
        loss.backward()
        if self.calls == self.bad_at:
            self.offset.grad.fill_(torch.nan)
        self.calls += 1
        return MetaStep(loss.item(), loss.item())

    def predict(self, support_inputs, support_targets, query_inputs):
        return self.offset.detach().expand(*query_inputs.shape)


def training(bad_at=-1, clip=0.0):
    method = Offset(bad_at)
    source = SineTasks(shot=2, query=3, seed=1)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9)
    rates = [0.1, 0.05, 0.2, 0.1, 0.1, 0.1]
    return FewShotTraining(
        method, source, optimizer, tasks=4, schedule=lambda index: rates[index], clip=clip
    )


def test_a_step_is_one_step_of_the_optimiser():
    trained, tasks = training(), SineTasks(shot=2, query=3, seed=1)
    offset, velocity = 0.0, 0.0
    for index, rate in enumerate([0.1, 0.05, 0.2]):
        targets = tasks.sample(4).query_targets
        values = trained.step(index)
        gradient = float(2 * (offset - targets.mean()))
        velocity = 0.9 * velocity + gradient
        assert values["loss"] == pytest.approx(float((targets - offset).square().mean()), rel=1e-5)
        offset -= rate * velocity
        assert float(trained.method.offset.detach()) == pytest.approx(offset, rel=1e-4)


def test_clipping_bounds_the_step():
    trained = training(clip=0.01)
    trained.step(0)
    assert float(trained.method.offset.detach().abs()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_skipped():
    trained = training(bad_at=1)
    first = trained.step(0)
    before = float(trained.method.offset.detach())
    assert trained.step(1)["skipped"] == 1.0
    assert float(trained.method.offset.detach()) == before
    assert first["skipped"] == trained.step(2)["skipped"] == 0.0


class Given:
    """These batches of tasks, one a step."""

    def __init__(self, *episodes):
        self.episodes = iter(episodes)

    def sample(self, count):
        return next(self.episodes)


def pictures(seed):
    """Two tasks of three classes, 2 x 3 pixels."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(each):
        inputs = torch.randn(2, 3 * each, 1, 2, 3, generator=generator)
        return inputs, torch.arange(3).repeat(2, each)

    return Episode(*drawn(2), *drawn(4))


def classifier():
    torch.manual_seed(5)
    return Classifier(FullyConnected(inputs=6, widths=(5, 4), statistics="running"), 3)


def trained_on(method, *episodes):
    """The training after a step on each, and which of the steps were skipped."""
    optimizer = torch.optim.Adam(method.parameters())
    training = FewShotTraining(
        method, Given(*episodes), optimizer, tasks=2, schedule=lambda _: 0.01, clip=0.5
    )
    return training, [training.step(index)["skipped"] for index in range(len(episodes))]


def assert_same_bits(one, two):
    for name, tensor in one.method.state_dict().items():
        assert torch.equal(tensor, two.method.state_dict()[name]), name
    moments, others = (each.optimizer.state_dict()["state"] for each in (one, two))
    assert moments.keys() == others.keys()
    for number, state in moments.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, others[number][name]), (number, name)


LEARNERS = {
    "maml": lambda: Maml(classifier(), rate=0.4, steps=2),
    "side by side": lambda: Maml(classifier(), rate=0.4, steps=2, together=None),
    "reptile": lambda: Reptile(classifier(), rate=0.01, steps=2, adam=True),
    "multi-task": lambda: MultiTask(classifier()),
    "prototypical": lambda: Prototypical(classifier().body, "running"),
}


@pytest.mark.parametrize("number", [torch.inf, torch.nan, 1e25], ids=["inf", "nan", "huge"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_skipped_step_is_as_if_it_had_never_been(kind, number):
    """The training ends as one without the bad batch: weights, statistics, moments, all."""
    bad = pictures(2)
    bad.support_inputs[1, 3] = number
    trained, skipped = trained_on(LEARNERS[kind](), pictures(1), bad, pictures(3))
    without, _ = trained_on(LEARNERS[kind](), pictures(1), pictures(3))
    assert skipped == [0.0, 1.0, 0.0]
    assert_same_bits(trained, without)


def test_moments_that_overflow_under_a_finite_gradient_are_not_kept():
    """Steps of nearly 0 from a second moment of infinity: Reptile would stand still for good."""
    bad = pictures(2)._replace(support_inputs=1e25 * pictures(2).support_inputs)
    method = Reptile(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), rate=0.01, steps=2, adam=True)
    twin = copy.deepcopy(method)
    trained, skipped = trained_on(method, pictures(1), bad, pictures(3))
    without, _ = trained_on(twin, pictures(1), pictures(3))
    assert all(p.grad.isfinite().all() for p in method.parameters())
    assert skipped == [0.0, 1.0, 0.0]
    assert_same_bits(trained, without)


def test_an_inner_loop_that_diverges_leaves_the_start():
    method = Maml(classifier(), rate=1e20, steps=2)
    start = copy.deepcopy(method.state_dict())
    trained, skipped = trained_on(method, pictures(1), pictures(3))
    assert skipped == [1.0, 1.0]
    assert all(torch.equal(start[name], tensor) for name, tensor in method.state_dict().items())
    assert not trained.optimizer.state


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    whole, part, rest = training(), training(), training()
    run(whole, num_steps=6, folder=tmp_path / "whole")
    run(part, num_steps=3, folder=tmp_path / "parts")
    run(rest, num_steps=6, folder=tmp_path / "parts")
    assert torch.equal(whole.method.offset, rest.method.offset)
    assert not torch.equal(whole.method.offset, part.method.offset)
