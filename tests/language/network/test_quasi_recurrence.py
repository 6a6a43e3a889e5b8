import itertools

import pytest
import torch

from metalm.language.network.quasi_recurrence import qrnn_layer, windows_of
from metalm.language.network.recurrence import LayerState

TIME, ROWS, INPUTS, HIDDEN = 5, 3, 2, 4
COMBINATIONS = list(itertools.product((1, 2, 3), (False, True), (False, True)))


def problem(window, weight_per_row, bias_per_row, time=TIME):
    """Leaves: inputs, the inputs before them, the cell, weight and bias."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        leaf(time, ROWS, INPUTS),
        leaf(ROWS, (window - 1) * INPUTS),
        leaf(ROWS, HIDDEN),
        leaf(*(ROWS,) * weight_per_row, 3 * HIDDEN, window * INPUTS),
        leaf(*(ROWS,) * bias_per_row, 3 * HIDDEN),
    ]


def run(inputs, before, cell, weight, bias):
    outputs, after = qrnn_layer(inputs, LayerState(before, cell), weight, bias)
    return outputs, after.hidden, after.cell


def one_token_at_a_time(inputs, before, cell, weight, bias):
    """A plain loop over rows and time."""
    outputs, befores, cells = [], [], []
    for row in range(ROWS):
        own_weight = weight[row] if weight.dim() == 3 else weight
        own_bias = bias[row] if bias.dim() == 2 else bias
        seen, c, found = before[row], cell[row], []
        for value in inputs[:, row]:
            seen = torch.cat((seen, value))
            z, f, o = (own_weight @ seen + own_bias).chunk(3)
            c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
            found.append(o.sigmoid() * c)
            seen = seen[INPUTS:]
        outputs.append(torch.stack(found))
        befores.append(seen)
        cells.append(c)
    return torch.stack(outputs, 1), torch.stack(befores), torch.stack(cells)


@pytest.mark.parametrize(("window", "weight_per_row", "bias_per_row"), COMBINATIONS)
def test_values_and_gradients_equal_a_plain_loop(window, weight_per_row, bias_per_row):
    leaves = problem(window, weight_per_row, bias_per_row)
    found, expected = run(*leaves), one_token_at_a_time(*leaves)
    generator = torch.Generator().manual_seed(2)
    cotangents = [
        torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in expected
    ]
    gradients = [
        torch.autograd.grad(parts, leaves, cotangents, allow_unused=True, materialize_grads=True)
        for parts in (found, expected)
    ]
    for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("window", [1, 2])
def test_derivatives_against_finite_differences(window, per_row):
    leaves = problem(window, per_row, per_row, time=3)

    def outputs(*leaves):
        return [part for part in run(*leaves) if part.numel()]

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_segment_equals_its_parts(window, cut):
    inputs, before, cell, weight, bias = problem(window, True, True)
    whole, last, after = run(inputs, before, cell, weight, bias)
    first, *state = run(inputs[:cut], before, cell, weight, bias)
    second, *state = run(inputs[cut:], *state, weight, bias)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(state, [last, after])


def test_windows():
    inputs = torch.arange(1.0, 5)[:, None, None]
    windows, last = windows_of(inputs, torch.tensor([[-1.0, 0.0]]))
    assert windows[:, 0].tolist() == [[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert last.tolist() == [[3, 4]]


def test_under_autocast_the_state_stays_in_float32():
    leaves = [leaf.float() for leaf in problem(2, True, True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, before, cell = run(*leaves)
    assert outputs.dtype == before.dtype == cell.dtype == torch.float32
    expected = run(*problem(2, True, True))[0]
    torch.testing.assert_close(outputs.double(), expected, rtol=0.05, atol=0.05)
