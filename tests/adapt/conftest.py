"""Tiny language models of a user's own, and an independent reading of a text with one."""

import numpy as np
import pytest
import torch
from torch import nn


class Recurrent(nn.Module):
    """h_t = tanh(E x_t + H h_{t-1}), logits = E h_t + b: one tensor in and out, batch first."""

    def __init__(self, vocabulary=11, size=5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, vocabulary)
        self.output.weight = self.embedding.weight

    def forward(self, tokens, state):
        if state is None:
            state = {
                "hidden": self.embedding.weight.new_zeros(len(tokens), self.hidden.in_features)
            }
        value, values = state["hidden"], []
        for time in range(tokens.shape[1]):
            value = torch.tanh(self.embedding(tokens[:, time]) + self.hidden(value))
            values.append(value)
        return self.output(torch.stack(values, 1)), {"hidden": value}


class PlainLSTM(nn.Module):
    """Embedding, `torch.nn.LSTM` and output; tokens [time, batch], a tuple as state."""

    def __init__(self, vocabulary=11, size=5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 3)
        self.lstm = nn.LSTM(3, size)
        self.output = nn.Linear(size, vocabulary)

    def forward(self, tokens, state):
        values, state = self.lstm(self.embedding(tokens), state)
        return self.output(values), state


@pytest.fixture
def recurrent():
    torch.manual_seed(3)
    return Recurrent().double()


@pytest.fixture
def plain_lstm():
    torch.manual_seed(4)
    return PlainLSTM().double()


@pytest.fixture
def texts():
    """Token arrays of different lengths, one of them a single token."""
    random = np.random.default_rng(5)
    return [random.integers(0, 11, length) for length in (17, 1, 13, 5, 8)]


@pytest.fixture
def plain_read():
    """Reads one text with `Recurrent`: score a segment, take its gradient, update, go on."""

    def read(model, tokens, segment, update, start_token=None):
        slow = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        weights, hidden = dict(slow), torch.zeros(5, dtype=torch.float64)
        sequence = list(tokens) if start_token is None else [start_token, *tokens]
        inputs, targets, nats = sequence[:-1], sequence[1:], []
        for start in range(0, len(targets), segment):
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            costs = []
            for token, target in zip(
                inputs[start : start + segment], targets[start : start + segment], strict=True
            ):
                vector = leaves["embedding.weight"][int(token)]
                recurrent = leaves["hidden.weight"] @ hidden + leaves["hidden.bias"]
                hidden = torch.tanh(vector + recurrent)
                logits = leaves["embedding.weight"] @ hidden + leaves["output.bias"]
                costs.append(-logits.log_softmax(0)[int(target)])
            nats += torch.stack(costs).tolist()
            gradients = torch.autograd.grad(sum(costs) / segment, list(leaves.values()))
            for name, gradient in zip(leaves, gradients, strict=True):
                weights[name] = update(weights[name], gradient, slow[name])
            hidden = hidden.detach()
        return np.array(nats), weights

    return read
