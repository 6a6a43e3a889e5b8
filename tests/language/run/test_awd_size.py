"""The model of the published figures, on the meta device, whose tensors have no memory."""

import pytest
import torch

from metalm.language.network.model import LanguageModel
from metalm.language.run.presets import PRESETS


def count_by_formula(vocabulary, embedding, hidden, layers):
    """Tied embedding, a bias a token, and a layer 4 n (m + n) weights and 8 n biases."""
    inputs = [embedding] + [hidden] * (layers - 1)
    outputs = [hidden] * (layers - 1) + [embedding]
    recurrent = sum(4 * n * (m + n) + 8 * n for m, n in zip(inputs, outputs, strict=True))
    return vocabulary * embedding + vocabulary + recurrent


@pytest.mark.parametrize("name", ["awd-lstm", "awd-lstm-1cycle"])
def test_awd_lstm_has_33_556_078_parameters(name):
    config = PRESETS[name]().model
    with torch.device("meta"):
        model = LanguageModel(config)
    assert [layer.hidden_size for layer in model.layers] == [1150, 1150, 400]
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == count_by_formula(33_278, 400, 1150, 3) == 33_556_078


@pytest.mark.parametrize("name", ["awd-qrnn", "awd-qrnn-1cycle"])
def test_awd_qrnn_has_33_354_628_parameters(name):
    """Two inputs at once in the first layer; three gates, and a bias for each."""
    config = PRESETS[name]().model
    with torch.device("meta"):
        model = LanguageModel(config)
    assert [layer.hidden_size for layer in model.layers] == [1550, 1550, 1550, 400]
    layers = 3 * 1550 * (2 * 400 + 1) + 2 * 3 * 1550 * (1550 + 1) + 3 * 400 * (1550 + 1)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == 33_278 * (400 + 1) + layers == 33_354_628
