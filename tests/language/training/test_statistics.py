import numpy as np
import pytest
import torch

from metalm.language.text.streams import TokenStreams
from metalm.language.training.statistics import gradient_rms, token_counts

SEGMENT, ROWS, SEED = 3, 2, 5
NAMES = ("embedding.weight", "layers.1.hidden_weight", "decoder.bias")


@pytest.fixture
def long_texts():
    random = np.random.default_rng(8)
    return [random.integers(0, 11, length).astype(np.int32) for length in (19, 8, 14, 6)]


def test_token_counts(texts, article_set):
    expected = [sum(int((text == token).sum()) for text in texts) for token in range(13)]
    assert token_counts(article_set(texts), 13).tolist() == expected


def brute_force(model, articles, counted, plain_nats, plain_state):
    """RMS over the counted segments, one row and one token at a time."""
    streams = TokenStreams(articles, ROWS, SEED, 0)
    leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    states = [plain_state(model) for _ in range(ROWS)]
    squares = dict.fromkeys(NAMES, 0.0)
    number = 0
    for start in range(0, streams.length - 1, SEGMENT):
        inputs, targets = streams.segment(start, SEGMENT)
        total = 0.0
        for row in range(ROWS):
            nats, _, state = plain_nats(leaves, inputs[:, row], targets[:, row], states[row])
            states[row] = [(hidden.detach(), cell.detach()) for hidden, cell in state]
            total = total + nats.sum()
        gradients = torch.autograd.grad(total / targets.numel(), [leaves[n] for n in NAMES])
        if number in counted:
            for name, gradient in zip(NAMES, gradients, strict=True):
                squares[name] = squares[name] + gradient**2
        number += 1
    return {name: (square / len(counted)).sqrt() for name, square in squares.items()}, number


def compare(found, expected):
    assert list(found) == list(NAMES)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cutoffs", [(), (4, 7)])
def test_gradient_rms_equals_plain_autograd_over_all_segments(
    tiny_model, long_texts, article_set, plain_nats, plain_state
):
    model, articles = tiny_model(input_dropout=0.5), article_set(long_texts)
    expected, count = brute_force(model, articles, range(8), plain_nats, plain_state)
    assert count == 8
    found = gradient_rms(model.train(), articles, NAMES, SEGMENT, rows=ROWS, seed=SEED)
    compare(found, expected)
    assert model.training


def test_a_few_batches_are_spread_over_the_text(
    tiny_model, long_texts, article_set, plain_nats, plain_state
):
    """With a model that forgets at once, leaving segments out changes nothing else."""
    model, articles = tiny_model(), article_set(long_texts)
    with torch.no_grad():
        for layer in model.layers:
            layer.hidden_weight.zero_()
            size = layer.hidden_size
            layer.hidden_bias[size : 2 * size] = -60.0
    expected, _ = brute_force(model, articles, (0, 4), plain_nats, plain_state)
    found = gradient_rms(model, articles, NAMES, SEGMENT, rows=ROWS, seed=SEED, batches=2)
    compare(found, expected)


@pytest.mark.parametrize(("batches", "counted"), [(1, 1), (2, 2), (3, 4), (8, 8), (200, 8)])
def test_the_batches_done_are_told(tiny_model, long_texts, article_set, batches, counted):
    """There are eight: every eighth, fourth, second (for three of them) or each is counted."""
    told = []
    asked = {
        "rows": ROWS,
        "seed": SEED,
        "batches": batches,
        "progress": lambda *now: told.append(now),
    }
    gradient_rms(tiny_model(), article_set(long_texts), NAMES, SEGMENT, **asked)
    assert told == [(done, counted) for done in range(1, counted + 1)]


def test_the_model_is_left_as_it_was(tiny_model, long_texts, article_set):
    model = tiny_model().requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    gradient_rms(model, article_set(long_texts), NAMES, SEGMENT)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
