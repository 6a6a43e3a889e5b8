import dataclasses
import math

import numpy as np
import pytest
import torch

from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.training.awd_training import AwdTraining, AwdTrainingConfig, start_as_published
from metalm.language.training.stream_loss import stream_loss
from metalm.training import precision

SEED, ROWS = 6, 3
NT_ASGD = AwdTrainingConfig(
    recipe="nt-asgd",
    epochs=6,
    rows=ROWS,
    window=5,
    short_windows=0.3,
    window_spread=2.0,
    shortest_window=2,
    learning_rate=2.0,
    weight_decay=0.03,
    clip=0.4,
    alpha=0.6,
    beta=0.8,
    non_monotone=1,
    validation_rows=2,
)
ONE_CYCLE = dataclasses.replace(
    NT_ASGD,
    recipe="one-cycle",
    epochs=4,
    rate_follows_length=False,
    learning_rate=0.05,
    phases=(1.0, 3.0, 2.0, 1.0),
)
DROPOUT = {
    "input_dropout": 0.3,
    "hidden_dropout": 0.2,
    "output_dropout": 0.4,
    "embedding_dropout": 0.1,
    "weight_dropout": 0.5,
}


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in (19, 22, 5, 18)])


@pytest.fixture
def validation(article_set):
    random = np.random.default_rng(4)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in (9, 8)])


class Reference:
    """The same training stream after stream, by plain autograd, and SGD written out."""

    def __init__(self, model, articles, plain_nats, plain_state):
        self.text = np.concatenate([article.tokens for article in articles]).tolist()
        self.model, self.plain_nats, self.plain_state = model, plain_nats, plain_state
        self.leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}

    def step(self, window):
        length = len(self.text) // ROWS
        if window.start == 0:
            self.states = [self.plain_state(self.model) for _ in range(ROWS)]
        nats, features = [], []
        for row in range(ROWS):
            start = row * length + window.start
            stop = min(start + window.length, (row + 1) * length)
            inputs = [0, *self.text][start:stop]
            costs, seen, state = self.plain_nats(
                self.leaves, inputs, self.text[start:stop], self.states[row]
            )
            self.states[row] = [(hidden.detach(), cell.detach()) for hidden, cell in state]
            nats.append(costs)
            features.append(seen)
        loss, seen = torch.stack(nats).mean(), torch.stack(features)
        penalty = 0.6 * (seen**2).mean()
        if seen.shape[1] > 1:
            penalty = penalty + 0.8 * ((seen[:, :-1] - seen[:, 1:]) ** 2).mean()
        gradients = torch.autograd.grad(loss + penalty, list(self.leaves.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        rate = 2.0 * window.length / 5
        with torch.no_grad():
            for weight, gradient in zip(self.leaves.values(), gradients, strict=True):
                clipped = gradient * min(1.0, 0.4 / (norm + 1e-6))
                weight -= rate * (clipped + 0.03 * weight)
        return {
            "loss": loss.item(),
            "penalty": penalty.item(),
            "tokens": float(nats[0].numel() * ROWS),
            "learning_rate": rate,
            "gradient_norm": norm,
        }


def test_steps_equal_plain_autograd_and_a_hand_written_sgd(
    tiny_model, articles, validation, plain_nats, plain_state
):
    """Two passes: windows of several lengths, one cut short by the end of the text."""
    model = tiny_model()
    config = dataclasses.replace(NT_ASGD, epochs=2)
    training = AwdTraining(model, articles, validation, config, SEED)
    reference = Reference(model, articles, plain_nats, plain_state)
    tokens = []
    for index in range(training.num_steps):
        window = training.plan.at(index)
        found, expected = training.step(index), reference.step(window)
        if window.is_last:
            own = {name: weight.detach() for name, weight in reference.leaves.items()}
            loss = stream_loss(model, own, training.validation, 3)
            assert found.pop("validation_loss") == pytest.approx(loss, rel=1e-7)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-7, err_msg=name)
        tokens.append((found["tokens"], found["learning_rate"]))
    assert len(set(tokens)) > 3
    assert any(count / ROWS != rate / 2.0 * 5 for count, rate in tokens)  # one was cut short
    assert sum(count for count, _ in tokens) >= 2 * (64 // ROWS - 1) * ROWS
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), reference.leaves[name].detach())


def test_the_activation_penalty_sees_the_dropout_and_the_slowness_does_not(
    tiny_model, articles, validation
):
    """Of the same weights and masks: AR against the activations that the softmax is taken of."""
    still = dataclasses.replace(NT_ASGD, learning_rate=0.0, alpha=1.0, beta=0.0)
    model = tiny_model(output_dropout=0.5)
    expected = {}
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
        config = dataclasses.replace(still, alpha=alpha, beta=beta)
        training = AwdTraining(model, articles, validation, config, SEED)
        inputs, _ = training.streams.segment(0, training.plan.at(0).length)
        torch.manual_seed(5)
        with torch.no_grad():
            seen = model.train().activations(inputs, model.initial_state(ROWS))
        expected["dropped"] = float(seen.dropped.square().mean())
        expected["whole"] = float(seen.features.square().mean())
        expected["slow"] = float((seen.features[1:] - seen.features[:-1]).square().mean())
        torch.manual_seed(5)
        found = training.step(0)["penalty"]
        assert found == pytest.approx(expected["dropped" if alpha else "slow"], rel=1e-9)
    assert expected["dropped"] != pytest.approx(expected["whole"], rel=0.05)


@pytest.mark.parametrize("config", [NT_ASGD, ONE_CYCLE], ids=lambda config: config.recipe)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_resumed_training_equals_an_unbroken_one(tiny_model, articles, validation, config, share):
    """With every dropout, whose masks come from the global generator, as the loop restores it."""
    torch.manual_seed(1)
    unbroken = AwdTraining(tiny_model(**DROPOUT), articles, validation, config, SEED)
    stopped_after = round(share * unbroken.num_steps)
    for step in range(unbroken.num_steps):
        if step == stopped_after:
            tensors, meta = unbroken.state_dict()
            kept = {name: tensor.clone() for name, tensor in tensors.items()}
            random = torch.get_rng_state()
        unbroken.step(step)
    again = AwdTraining(tiny_model(seed=9, **DROPOUT), articles, validation, config, SEED)
    again.load_state_dict(kept, meta)
    torch.set_rng_state(random)
    for step in range(stopped_after, again.num_steps):
        again.step(step)
    expected, form = unbroken.state_dict()
    found, found_form = again.state_dict()
    assert form == found_form
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for mine, other in zip(
        unbroken.finish().parameters(), again.finish().parameters(), strict=True
    ):
        assert torch.equal(mine, other)


def test_what_is_left_are_the_weights_of_lowest_validation_loss(tiny_model, articles, validation):
    """At a rate that is far too high the averages begin, and are better than the last weights."""
    model = tiny_model()
    config = dataclasses.replace(NT_ASGD, learning_rate=25.0, epochs=9)
    training = AwdTraining(model, articles, validation, config, SEED)
    losses = [training.step(n).get("validation_loss") for n in range(training.num_steps)]
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert training.descent.weights["embedding.weight"] is not model.embedding.weight
    last = stream_loss(model, own, training.validation, 5)
    training.finish()
    left = stream_loss(model, dict(model.named_parameters()), training.validation, 5)
    assert left == pytest.approx(min(loss for loss in losses if loss is not None), rel=1e-9)
    assert left < last


def test_one_cycle_learns_a_cycle_of_tokens(tiny_model, article_set):
    articles = article_set([np.arange(n, dtype=np.int32) % 4 + 1 for n in (40, 44, 48)])
    model = tiny_model(dtype=torch.float32)
    config = dataclasses.replace(ONE_CYCLE, epochs=12, alpha=0.0, beta=0.0, weight_decay=0.0)
    training = AwdTraining(model, articles, articles, config, SEED)
    values = [training.step(step) for step in range(training.num_steps)]
    assert values[0]["loss"] > 2.0
    assert values[-1]["validation_loss"] < 0.5
    assert values[-1]["learning_rate"] < values[0]["learning_rate"]


@pytest.mark.parametrize(
    ("which", "layers", "softmax"), [("off", 0, 0), ("softmax", 0, 1), ("all", 1, 1)]
)
def test_what_is_in_bfloat16(tiny_model, articles, validation, monkeypatch, which, layers, softmax):
    """The loss, against one computed by hand from layers and logits in these types."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)
    model = tiny_model(dtype=torch.float32)
    config = dataclasses.replace(NT_ASGD, learning_rate=0.0, weight_decay=0.0, bfloat16=which)
    training = AwdTraining(model, articles, validation, config, SEED)
    inputs, targets = training.streams.segment(0, training.plan.at(0).length)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(layers)):
            seen = model.activations(inputs, model.initial_state(ROWS))
        dropped, weight, bias = seen.dropped, model.embedding.weight, model.decoder.bias
        kind = torch.bfloat16 if softmax else torch.float32
        logits = torch.nn.functional.linear(dropped.to(kind), weight.to(kind), bias.to(kind))
    said = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    assert training.step(0)["loss"] == pytest.approx(-float(said.mean()), rel=1e-6)
    assert logits.dtype == kind
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_the_published_start_is_that_of_torch():
    """The same draws as `torch.nn.LSTM` makes, layer for layer, after the embedding's."""
    config = ModelConfig(vocabulary_size=7, embedding_size=3, hidden_size=5, num_layers=2)
    torch.manual_seed(4)
    model = start_as_published(LanguageModel(config))
    torch.manual_seed(4)
    torch.nn.Embedding(7, 3).weight.detach().uniform_(-0.1, 0.1)
    layers = [torch.nn.LSTM(3, 5), torch.nn.LSTM(5, 3)]
    for layer, expected in zip(model.layers, layers, strict=True):
        for own, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(own, theirs)
    assert not model.decoder.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"awd.epochs is too low; expected at least 1, found 0"),
        ({"phases": (0.0, 0.0, 0.0, 0.0)}, r"awd.phases are lengths; expected four numbers"),
        ({"phases": (1.0, -1.0, 1.0, 1.0)}, r"awd.phases are lengths; expected four numbers"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NT_ASGD, **changes)


def test_no_published_training(tiny_model, articles, validation):
    with pytest.raises(ValueError, match=r"no published training; expected awd\.recipe 'nt-asgd'"):
        AwdTraining(
            tiny_model(), articles, validation, AwdTrainingConfig(rows=2, validation_rows=2), SEED
        )


def test_too_little_validation_text(tiny_model, articles, article_set):
    little = article_set([np.array([1, 2, 3], dtype=np.int32)])
    with pytest.raises(ValueError, match="too little text for 2 rows; expected at least 4 tokens"):
        AwdTraining(tiny_model(), articles, little, NT_ASGD, SEED)
