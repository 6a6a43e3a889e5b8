import numpy as np
import pytest
import torch

from metalm.language.text.streams import TokenStreams
from metalm.language.training.stream_loss import stream_loss


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("window", [2, 5, 40])
def test_every_token_is_read_after_those_before_it_in_its_row(
    tiny_model, texts, article_set, plain_nats, plain_state, rows, window
):
    """Against one stream at a time by plain autograd, with weights that are not the model's own."""
    model = tiny_model(input_dropout=0.5, weight_dropout=0.5).train()
    other = {name: weight.detach().clone() for name, weight in tiny_model(1).named_parameters()}
    streams = TokenStreams(article_set(texts), rows, 0, 0, shuffled=False)
    found = stream_loss(model, other, streams, window)
    text = np.concatenate(texts)
    length = len(text) // rows
    inputs = np.concatenate(([0], text[:-1]))
    nats = []
    for row in range(rows):
        part = slice(row * length, (row + 1) * length)
        costs, _, _ = plain_nats(other, inputs[part], text[part], plain_state(model))
        nats += costs.tolist()
    assert found == pytest.approx(np.mean(nats), rel=1e-10)
    assert model.training
    assert not any(
        torch.equal(weight, other[name])
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    )
