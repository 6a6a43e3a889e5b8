import pytest
import torch
from torch import nn

from metalm.fewshot.methods.method import FewShotMethod, MetaStep
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


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    whole, part, rest = training(), training(), training()
    run(whole, num_steps=6, folder=tmp_path / "whole")
    run(part, num_steps=3, folder=tmp_path / "parts")
    run(rest, num_steps=6, folder=tmp_path / "parts")
    assert torch.equal(whole.method.offset, rest.method.offset)
    assert not torch.equal(whole.method.offset, part.method.offset)
