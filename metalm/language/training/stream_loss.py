"""The loss of a model on a text in streams: articles end to end, the hidden state carried."""

from __future__ import annotations

import torch

from metalm.language.network.model import LanguageModel, ModelOutput
from metalm.language.text.streams import TokenStreams
from metalm.meta.parameters import Parameters, call


@torch.no_grad()
def stream_loss(
    model: LanguageModel, weights: Parameters, streams: TokenStreams, window: int
) -> float:
    """Mean loss in nats per token, without dropout and without learning.

    Args:
        model: its form; not changed.
        weights: the numbers to read with, by the names of `model.named_parameters()`.
        streams: the text; each stream begins with a hidden state of zeros.
        window: tokens of each row taken at once; the loss does not depend on it.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    try:
        state = model.initial_state(streams.rows)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, streams.length, window):
            inputs, targets = (part.to(device) for part in streams.segment(start, window))
            output: ModelOutput = call(model, weights, inputs, state)
            total += output.prediction.nats(targets).sum()
            state = output.state
    finally:
        model.train(was_training)
    return float(total) / (streams.rows * streams.length)
