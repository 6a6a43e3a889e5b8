"""Reading with low-rank fast weights, against sums W_0 + U V written out, article by article."""

import numpy as np
import pytest
import torch

from metalm.language.reading.reader import Reader
from metalm.meta.low_rank import LowRank
from metalm.meta.parameters import choose
from metalm.meta.rules import GradientDescent

pytestmark = pytest.mark.parametrize("cell", ["lstm", "qrnn"])

SEGMENT = 4
CHOSEN = ("embedding.weight", "layers.0.input_weight")


@pytest.mark.parametrize("rows", [1, 3])
def test_reading_equals_a_hand_written_loop(tiny_model, texts, plain_nats, plain_state, rows):
    model = tiny_model()
    low = LowRank(model, CHOSEN, rank=2)
    names = choose(low, ["factors.*", "module.decoder.bias"])
    readings = Reader(low, GradientDescent(0.7, 0.05), names, SEGMENT).read(texts, rows)
    static = Reader(model).read(texts)
    assert sum(readings.fallbacks) == 0
    for text, nats, before in zip(texts, readings.nats, static.nats, strict=True):
        slow = {name: low.get_parameter(name).detach() for name in names}
        fast, state, expected = dict(slow), plain_state(model), []
        for start in range(0, len(text), SEGMENT):
            fast = {name: weight.clone().requires_grad_() for name, weight in fast.items()}
            weights = {name: weight.detach() for name, weight in model.named_parameters()}
            for name in CHOSEN:
                key = f"factors.{name.replace('.', '/')}"
                weights[name] = weights[name] + fast[f"{key}.left"] @ fast[f"{key}.right"]
            weights["decoder.bias"] = fast["module.decoder.bias"]
            inputs, part = [0, *text[:-1]], slice(start, start + SEGMENT)
            costs, _, state = plain_nats(weights, inputs[part], text[part], state)
            state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
            expected += costs.tolist()
            gradients = torch.autograd.grad(costs.sum() / SEGMENT, list(fast.values()))
            fast = {
                name: (weight - 0.7 * gradient + 0.05 * (slow[name] - weight)).detach()
                for (name, weight), gradient in zip(fast.items(), gradients, strict=True)
            }
        np.testing.assert_allclose(nats, expected, rtol=1e-10)
        np.testing.assert_allclose(nats[:SEGMENT], before[:SEGMENT], rtol=1e-12)
        assert len(text) <= SEGMENT or abs(nats - before).max() > 1e-3
