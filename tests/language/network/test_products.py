"""Products with weights per row under autocast: taken in bfloat16, everything else in float32."""

import pytest
import torch

from metalm.language.network.products import product_type
from metalm.language.network.recurrence import LayerState, LayerWeights, row_lstm
from metalm.language.network.row_linear import row_linear

TIME, ROWS, IN, SIZE = 7, 3, 16, 8


def normal(generator, *shape):
    return torch.randn(shape, generator=generator) / 2


def rounded(tensor):
    """What bfloat16 keeps of a number."""
    return tensor.bfloat16().float()


def test_logits_and_their_gradients_are_products_of_rounded_numbers():
    generator = torch.Generator().manual_seed(1)
    values, weight, bias = (
        normal(generator, *shape).requires_grad_()
        for shape in ((TIME, ROWS, IN), (ROWS, 11, IN), (ROWS, 11))
    )
    incoming = normal(generator, TIME, ROWS, 11)
    with torch.autocast("cpu", torch.bfloat16):
        logits = row_linear(values, weight, bias)
    assert logits.dtype == torch.float32
    found = torch.autograd.grad(logits, [values, weight, bias], incoming)
    x, w, g = (rounded(t.detach()) for t in (values, weight, incoming))
    expected = torch.einsum("tri,rvi->trv", x, w) + bias.detach()
    gradients = (
        torch.einsum("trv,rvi->tri", g, w),
        torch.einsum("trv,tri->rvi", g, x),
        incoming.sum(0),
    )
    for one, other in zip((logits, *found), (expected, *gradients), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("recurrent_per_row", [False, True])
def test_an_lstm_under_autocast_is_close_to_float32(recurrent_per_row):
    generator = torch.Generator().manual_seed(2)
    recurrent = (ROWS, 4 * SIZE, SIZE) if recurrent_per_row else (4 * SIZE, SIZE)
    shapes = [(ROWS, 4 * SIZE, IN), recurrent, (ROWS, 4 * SIZE), (ROWS, 4 * SIZE)]
    inputs = normal(generator, TIME, ROWS, IN).requires_grad_()
    weights = LayerWeights(*(normal(generator, *shape).requires_grad_() for shape in shapes))
    state = LayerState(normal(generator, ROWS, SIZE), normal(generator, ROWS, SIZE))
    incoming = normal(generator, TIME, ROWS, SIZE)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs, after = row_lstm(inputs, state, weights)
        gradients = torch.autograd.grad(outputs, [inputs, *weights], incoming)
        return outputs, after.cell, *gradients

    differ = False
    for exact, found in zip(run(False), run(True), strict=True):
        assert found.dtype == torch.float32
        error = (found - exact).norm() / exact.norm()
        assert error < 0.02
        differ |= bool(error > 1e-5)
    assert differ


def test_float64_stays_what_it_is():
    with torch.autocast("cpu", torch.bfloat16):
        assert product_type(torch.zeros(1)) == torch.bfloat16
        assert product_type(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert product_type(torch.zeros(1)) == torch.float32
