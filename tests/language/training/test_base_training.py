import dataclasses
import math

import numpy as np
import pytest
import torch

from metalm.language.text.article_passes import ArticlePasses
from metalm.language.training.base_training import BaseTraining, BaseTrainingConfig, one_cycle
from metalm.training import precision

SEED, ROWS, WINDOW = 6, 3, 4
CONFIG = BaseTrainingConfig(
    rows=ROWS, window=WINDOW, learning_rate=0.05, weight_decay=0.1, clip=0.3, bfloat16=False
)


def schedule(index):
    return 1.0 / (1 + index)


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in (9, 12, 5, 8)])


class Reference:
    """The same training row after row, by plain autograd and an AdamW written out."""

    def __init__(self, model, articles, plain_nats, plain_state):
        self.texts = [article.tokens for article in articles]
        self.model, self.plain_nats, self.plain_state = model, plain_nats, plain_state
        self.leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
        self.first = {name: torch.zeros_like(weight) for name, weight in self.leaves.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.leaves.items()}
        self.entered, self.rows = 0, [None] * ROWS

    def enter(self):
        number, place = divmod(self.entered, len(self.texts))
        order = np.random.default_rng([SEED, number]).permutation(len(self.texts))
        self.entered += 1
        text = self.texts[order[place]].tolist()
        return {"text": text, "position": 0, "state": self.plain_state(self.model)}

    def read(self, row):
        """The losses of a row's tokens in one window, each after the token before it."""
        part = slice(row["position"], min(row["position"] + WINDOW, len(row["text"])))
        inputs = [0, *row["text"]][part]
        nats, _, state = self.plain_nats(self.leaves, inputs, row["text"][part], row["state"])
        row["state"] = [(hidden.detach(), cell.detach()) for hidden, cell in state]
        row["position"] = part.stop
        return nats

    def step(self, index):
        for number, row in enumerate(self.rows):
            if row is None or row["position"] == len(row["text"]):
                self.rows[number] = self.enter()
        nats = torch.cat([self.read(row) for row in self.rows])
        loss = nats.mean()
        gradients = torch.autograd.grad(loss, list(self.leaves.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        rate = 0.05 * schedule(index)
        with torch.no_grad():
            for name, gradient in zip(self.leaves, gradients, strict=True):
                clipped = gradient * min(1.0, 0.3 / (norm + 1e-6))
                self.first[name] = 0.9 * self.first[name] + 0.1 * clipped
                self.second[name] = 0.99 * self.second[name] + 0.01 * clipped**2
                mean = self.first[name] / (1 - 0.9 ** (index + 1))
                scale = (self.second[name] / (1 - 0.99 ** (index + 1))).sqrt() + 1e-8
                weight = self.leaves[name]
                weight -= rate * 0.1 * weight + rate * mean / scale
        return {
            "loss": loss.item(),
            "tokens": len(nats),
            "learning_rate": rate,
            "gradient_norm": norm,
        }


def test_steps_equal_plain_autograd_and_a_hand_written_adam(
    tiny_model, articles, plain_nats, plain_state
):
    """Twelve steps: rows end inside of a window and at its end, and a third pass begins."""
    model = tiny_model()
    training = BaseTraining(model, articles, CONFIG, schedule, SEED)
    reference = Reference(model, articles, plain_nats, plain_state)
    tokens = set()
    for index in range(12):
        found, expected = training.step(index), reference.step(index)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)
        tokens.add(found["tokens"])
    assert reference.entered > 2 * len(articles)
    assert max(tokens) == ROWS * WINDOW > min(tokens)
    for name, weight in model.named_parameters():
        expected = reference.leaves[name].detach()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=1e-9)


def test_an_article_is_read_as_if_it_were_alone(tiny_model, article_set, plain_nats, plain_state):
    """Neither the article before it nor its neighbours are in the hidden state it begins with."""
    random = np.random.default_rng(1)
    texts = [random.integers(0, 11, 4).astype(np.int32) for _ in range(6)]
    still = BaseTrainingConfig(rows=2, window=4, learning_rate=0.0, bfloat16=False)
    model = tiny_model()
    training = BaseTraining(model, article_set(texts), still, schedule, SEED)
    found = [training.step(index)["loss"] for index in range(3)]
    weights = dict(model.named_parameters())
    alone = []
    for text in texts:
        nats, _, _ = plain_nats(weights, [0, *text[:-1]], text, plain_state(model))
        alone.append(nats.mean().item())
    order = np.random.default_rng([SEED, 0]).permutation(6)
    expected = [(alone[order[2 * step]] + alone[order[2 * step + 1]]) / 2 for step in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


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


def test_the_loss_is_averaged_in_float32_under_bfloat16(tiny_model, articles, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)
    model = tiny_model().float().eval()
    model.train = lambda mode=True: model  # without dropout, so that the loss can be taken again
    config = dataclasses.replace(CONFIG, bfloat16=True, learning_rate=0.0, weight_decay=0.0)
    training = BaseTraining(model, articles, config, schedule, SEED)
    again = ArticlePasses(articles, ROWS, SEED)
    again.rows.enter()
    inputs, targets, mask = again.rows.take(WINDOW)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs, model.initial_state(ROWS)).logits
    said = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = -(said * mask).sum() / mask.sum()
    assert training.step(0)["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_one_cycle():
    points = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.6, 1.0: 0.2, 1.5: 0.2}
    for progress, expected in points.items():
        assert math.isclose(one_cycle(progress, 0.1, 0.2), expected, abs_tol=1e-12)
    fine = [one_cycle(p, 0.1, 0.2) for p in np.linspace(0.1, 1, 50)]
    assert fine == sorted(fine, reverse=True)


def test_steps_follow_from_tokens():
    assert CONFIG.tokens_per_step == 12
    assert [CONFIG.steps(tokens) for tokens in (1, 12, 29, 31)] == [1, 1, 2, 3]
