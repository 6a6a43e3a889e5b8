import math

import numpy as np
import pytest
import torch

from metalm.language.base_training import BaseTraining, BaseTrainingConfig, one_cycle
from metalm.language.streams import TokenStreams

SEED = 6
CONFIG = BaseTrainingConfig(
    rows=3, window=4, learning_rate=0.05, weight_decay=0.1, clip=0.3, bfloat16=False
)


def schedule(index):
    return 1.0 / (1 + index)


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in (9, 12, 5, 8)])


def test_steps_equal_plain_autograd_and_a_hand_written_adam(
    tiny_model, articles, plain_nats, plain_state
):
    """Seven steps: the streams are 11 tokens long, so that passes end in between."""
    model = tiny_model()
    training = BaseTraining(model, articles, CONFIG, schedule, SEED)
    leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    first = {name: torch.zeros_like(weight) for name, weight in leaves.items()}
    second = {name: torch.zeros_like(weight) for name, weight in leaves.items()}
    number, position, states = -1, 99, []
    for step in range(7):
        found = training.step(step)
        if position >= 11:
            number, position = number + 1, 0
            streams = TokenStreams(articles, 3, SEED, number)
            states = [plain_state(model) for _ in range(3)]
        inputs, targets = streams.segment(position, 4)
        position += 4
        total = 0.0
        for row in range(3):
            nats, _, state = plain_nats(leaves, inputs[:, row], targets[:, row], states[row])
            states[row] = [(hidden.detach(), cell.detach()) for hidden, cell in state]
            total = total + nats.sum()
        loss = total / targets.numel()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        rate = 0.05 * schedule(step)
        with torch.no_grad():
            for name, gradient in zip(leaves, gradients, strict=True):
                clipped = gradient * min(1.0, 0.3 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * clipped
                second[name] = 0.99 * second[name] + 0.01 * clipped**2
                mean = first[name] / (1 - 0.9 ** (step + 1))
                scale = (second[name] / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
                leaves[name] -= rate * 0.1 * leaves[name] + rate * mean / scale
        assert found["tokens"] == targets.numel()
        np.testing.assert_allclose(found["loss"], loss.item(), rtol=1e-9)
        np.testing.assert_allclose(found["gradient_norm"], norm, rtol=1e-9)
        np.testing.assert_allclose(found["learning_rate"], rate)
    assert number == 2
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), leaves[name].detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("stopped_after", [1, 3, 4])
def test_a_resumed_training_equals_an_unbroken_one(tiny_model, articles, stopped_after):
    unbroken = BaseTraining(tiny_model(), articles, CONFIG, schedule, SEED)
    for step in range(6):
        unbroken.step(step)
    broken = BaseTraining(tiny_model(), articles, CONFIG, schedule, SEED)
    for step in range(stopped_after):
        broken.step(step)
    tensors, meta = broken.state_dict()
    again = BaseTraining(tiny_model(seed=9), articles, CONFIG, schedule, SEED)
    again.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    for step in range(stopped_after, 6):
        again.step(step)
    for name, tensor in unbroken.state_dict()[0].items():
        assert torch.equal(tensor, again.state_dict()[0][name]), name
    assert unbroken.state_dict()[1] == again.state_dict()[1]


def test_a_training_goes_on_with_the_optimiser_of_another(tiny_model, articles):
    """Two trainings, the second with the first one's optimiser, equal a single Adam run."""
    model = tiny_model()
    first = BaseTraining(model, articles, CONFIG, schedule, SEED)
    first.step(0)
    carried = BaseTraining(model, articles, CONFIG, schedule, SEED, first.optimizer.state_dict())
    steps = [float(state["step"]) for state in carried.optimizer.state_dict()["state"].values()]
    assert set(steps) == {1.0}
    carried.step(0)
    steps = [float(state["step"]) for state in carried.optimizer.state_dict()["state"].values()]
    assert set(steps) == {2.0}


def test_training_in_bfloat16_learns_a_cycle_of_tokens(tiny_model, article_set):
    model = tiny_model(dtype=torch.float32)
    articles = article_set([np.arange(n, dtype=np.int32) % 4 + 1 for n in (9, 12, 5, 8)])
    config = BaseTrainingConfig(rows=3, window=4, learning_rate=0.03, clip=1.0)
    training = BaseTraining(model, articles, config, lambda index: 1.0, SEED)
    losses = [training.step(step)["loss"] for step in range(60)]
    assert np.mean(losses[:3]) > 2.0
    assert np.mean(losses[-6:]) < 1.0


def test_one_cycle():
    points = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.6, 1.0: 0.2, 1.5: 0.2}
    for progress, expected in points.items():
        assert math.isclose(one_cycle(progress, 0.1, 0.2), expected, abs_tol=1e-12)
    fine = [one_cycle(p, 0.1, 0.2) for p in np.linspace(0.1, 1, 50)]
    assert fine == sorted(fine, reverse=True)


def test_steps_follow_from_tokens():
    assert CONFIG.tokens_per_step == 12
    assert [CONFIG.steps(tokens) for tokens in (1, 12, 29, 31)] == [1, 1, 2, 3]
