import itertools

import pytest
import torch

from metalm.language.network import compiled_walks
from metalm.language.network.recurrence import (
    LayerState,
    LayerWeights,
    filled_up,
    lstm_layer,
    row_lstm,
    shared_lstm,
)
from metalm.training.compiling import OftenCalled

TIME, ROWS, INPUTS, HIDDEN = 4, 3, 2, 5
SHAPES = ((4 * HIDDEN, INPUTS), (4 * HIDDEN, HIDDEN), (4 * HIDDEN,), (4 * HIDDEN,))
TORCH_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
COMBINATIONS = list(itertools.product((False, True), repeat=4))


@pytest.fixture(params=["loops", "compiled walks"], autouse=True)
def walks(request, monkeypatch):
    """Both ways through time; the pieces as they stand (`test_compiled_walks.py` compiles them)."""
    if request.param == "loops":
        return
    monkeypatch.setattr(compiled_walks, "wanted", lambda steps: len(steps) > 0)
    for name in ("read_piece", "back_piece", "change_piece"):
        function = getattr(compiled_walks, name).function
        monkeypatch.setattr(compiled_walks, name, OftenCalled(function, 10**9))


def random_problem(per_row, time=TIME, seed=1):
    """Leaves: inputs, hidden, cell and the four weights; per_row says which have rows."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.mul_(0.7).requires_grad_()

    weights = [
        leaf(ROWS, *shape) if own else leaf(*shape)
        for shape, own in zip(SHAPES, per_row, strict=True)
    ]
    return [leaf(time, ROWS, INPUTS), leaf(ROWS, HIDDEN), leaf(ROWS, HIDDEN), *weights]


def cotangents(time=TIME):
    generator = torch.Generator().manual_seed(9)
    shapes = ((time, ROWS, HIDDEN), (ROWS, HIDDEN), (ROWS, HIDDEN))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(layer, leaves):
    inputs, hidden, cell, *weights = leaves
    outputs, after = layer(inputs, LayerState(hidden, cell), LayerWeights(*weights))
    return [outputs, after.hidden, after.cell]


def run_torch(leaves, time=TIME):
    """`torch.nn.LSTM` on one row after the other: values, and the gradient of every leaf."""
    inputs, hidden, cell, *weights = (leaf.detach() for leaf in leaves)
    gradients = [torch.zeros_like(leaf) for leaf in (inputs, hidden, cell, *weights)]
    values = [torch.empty_like(part) for part in cotangents(time)]
    for row in range(ROWS):
        module = torch.nn.LSTM(INPUTS, HIDDEN).double()
        with torch.no_grad():
            for name, weight, shape in zip(TORCH_NAMES, weights, SHAPES, strict=True):
                own = weight.dim() > len(shape)
                module.get_parameter(name).copy_(weight[row] if own else weight)
        x = inputs[:, row : row + 1].clone().requires_grad_()
        h, c = (part[None, row : row + 1].clone().requires_grad_() for part in (hidden, cell))
        outputs, (h_after, c_after) = module(x, (h, c))
        found = [outputs[:, 0], h_after[0, 0], c_after[0, 0]]
        out, h_out, c_out = cotangents(time)
        torch.autograd.backward(found, [out[:, row], h_out[row], c_out[row]])
        values[0][:, row], values[1][row], values[2][row] = (part.detach() for part in found)
        gradients[0][:, row] = x.grad[:, 0]
        gradients[1][row], gradients[2][row] = h.grad[0, 0], c.grad[0, 0]
        for place, (name, shape) in enumerate(zip(TORCH_NAMES, SHAPES, strict=True)):
            total = gradients[3 + place]
            own = total.dim() > len(shape)
            (total[row] if own else total).add_(module.get_parameter(name).grad)
    return values, gradients


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per_row", COMBINATIONS, ids=str)
@pytest.mark.parametrize("layer", [row_lstm, lstm_layer])
def test_rows_equal_torch_lstm_forward_and_backward(layer, per_row):
    leaves = random_problem(per_row)
    values, gradients = run_torch(leaves)
    found = run(layer, leaves)
    assert_all_close(found, values)
    torch.autograd.backward(found, cotangents())
    assert_all_close([leaf.grad for leaf in leaves], gradients)


def test_one_time_step():
    leaves = random_problem((True, False, True, False), time=1)
    values, gradients = run_torch(leaves, time=1)
    found = run(row_lstm, leaves)
    assert_all_close(found, values)
    torch.autograd.backward(found, cotangents(1))
    assert_all_close([leaf.grad for leaf in leaves], gradients)


def test_shared_path_equals_the_row_path_with_the_same_weights_in_every_row():
    leaves = random_problem((False,) * 4)
    shared = run(shared_lstm, leaves)
    shared_gradients = torch.autograd.grad(shared, leaves, cotangents())
    stacked = [
        leaf.detach().expand(ROWS, *leaf.shape).clone().requires_grad_() for leaf in leaves[3:]
    ]
    rows = run(row_lstm, [*leaves[:3], *stacked])
    row_gradients = torch.autograd.grad(rows, [*leaves[:3], *stacked], cotangents())
    assert_all_close(rows, shared)
    assert_all_close(row_gradients[:3], shared_gradients[:3])
    assert_all_close([g.sum(0) for g in row_gradients[3:]], shared_gradients[3:])


@pytest.mark.parametrize(
    "per_row", [(False,) * 4, (True,) * 4, (True, False, False, True)], ids=str
)
def test_gradients_against_finite_differences(per_row):
    leaves = random_problem(per_row, time=2)
    assert torch.autograd.gradcheck(lambda *leaves: tuple(run(row_lstm, leaves)), leaves)


@pytest.mark.parametrize("layer", [row_lstm, shared_lstm])
def test_a_segment_equals_its_parts_with_the_state_passed_on(layer):
    leaves = random_problem((False,) * 4)
    inputs, hidden, cell, *weights = leaves
    whole = run(layer, leaves)
    first, state = layer(inputs[:3], LayerState(hidden, cell), LayerWeights(*weights))
    second, state = layer(inputs[3:], state, LayerWeights(*weights))
    assert_all_close([torch.cat((first, second)), state.hidden, state.cell], whole)


@pytest.mark.parametrize("frozen", range(7))
def test_what_needs_no_gradient_gets_none_and_the_others_are_the_same(frozen):
    leaves = random_problem((True, True, False, True))
    everything = torch.autograd.grad(run(row_lstm, leaves), leaves, cotangents())
    leaves[frozen].requires_grad_(False)
    torch.autograd.backward(run(row_lstm, leaves), cotangents())
    assert leaves[frozen].grad is None
    others = [number for number in range(7) if number != frozen]
    assert_all_close([leaves[n].grad for n in others], [everything[n] for n in others])


def test_reading_without_gradient_gives_the_same_bits():
    leaves = random_problem((True, True, True, True))
    with_gradient = run(row_lstm, leaves)
    with torch.no_grad():
        without = run(row_lstm, leaves)
    for one, other in zip(with_gradient, without, strict=True):
        assert torch.equal(one, other)


def test_a_row_does_not_depend_on_the_others():
    leaves = random_problem((True, True, True, True))
    before = run(row_lstm, leaves)
    with torch.no_grad():
        for leaf in leaves[1:]:
            leaf[2] = torch.nan
        leaves[0][:, 2] = torch.nan
    after = run(row_lstm, leaves)
    assert torch.equal(before[0][:, :2], after[0][:, :2])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one[:2], other[:2])


def plain_lstm(inputs, state, weights):
    """A loop over time in plain operations, for weights of any kind."""
    hidden, cell = state
    outputs = []

    def times(weight, values):
        return (weight @ values.unsqueeze(-1)).squeeze(-1)

    for x in inputs:
        gates = times(weights.input_weight, x) + times(weights.hidden_weight, hidden)
        i, f, g, o = (gates + weights.input_bias + weights.hidden_bias).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs), LayerState(hidden, cell)


def second_gradients(layer, leaves, chosen):
    """Of a function of the first gradients of the chosen leaves and of the outputs themselves."""
    outputs, hidden, cell = run(layer, leaves)
    first = torch.autograd.grad(
        (outputs.sin() * cotangents()[0]).sum() + (hidden * cell).sum(), chosen, create_graph=True
    )
    total = sum((gradient.square() * gradient).sum() for gradient in first)
    return torch.autograd.grad(total + outputs.square().sum() + cell.exp().sum(), leaves)


@pytest.mark.parametrize("per_row", COMBINATIONS, ids=str)
@pytest.mark.parametrize("layer", [row_lstm, shared_lstm])
def test_second_derivatives_equal_those_of_a_plain_loop(layer, per_row):
    if layer is shared_lstm and any(per_row):
        layer = lstm_layer
    leaves = random_problem(per_row)
    found, expected = (second_gradients(kind, leaves, leaves) for kind in (layer, plain_lstm))
    assert_all_close(found, expected)


@pytest.mark.parametrize("chosen", range(7))
def test_second_derivatives_through_one_gradient_alone(chosen):
    for per_row in ((False, True, True, True), (True, False, False, False)):
        leaves = random_problem(per_row)
        found, expected = (
            second_gradients(kind, leaves, [leaves[chosen]]) for kind in (row_lstm, plain_lstm)
        )
        assert_all_close(found, expected)


def test_second_derivatives_against_finite_differences():
    leaves = random_problem((True, True, False, True), time=2)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: tuple(run(row_lstm, leaves)), leaves, fast_mode=True
    )


@pytest.mark.parametrize(("inputs", "hidden"), [(5, 11), (8, 11), (5, 16), (8, 8)])
def test_filled_up_is_the_same_layer(inputs, hidden):
    """Outputs, states and gradients; what is added stays zero."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    given, state = leaf(4, 3, inputs), LayerState(leaf(3, hidden), leaf(3, hidden))
    shapes = (4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)
    weights = LayerWeights(*(leaf(*shape) for shape in shapes))
    leaves, found = [given, *state, *weights], []
    for layer in (given, state, weights), filled_up(given, state, weights, 8):
        outputs, after = shared_lstm(*layer)
        assert not outputs[..., hidden:].any()
        kept = outputs[..., :hidden], *(part[:, :hidden] for part in after)
        loss = sum(part.sin().sum() for part in kept)
        found.append([*kept, *torch.autograd.grad(loss, leaves)])
    assert all(size % 8 == 0 for size in (layer[0].shape[-1], layer[1].hidden.shape[-1]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_weights_of_one_row():
    hidden = 3
    leads = (1,), (), (1,), ()
    shapes = (4 * hidden, 2), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)
    weights = LayerWeights(*(torch.rand(*a, *b) for a, b in zip(leads, shapes, strict=True)))
    alone = weights.of_one_row()
    assert alone.are_shared
    state = LayerState(torch.rand(1, hidden), torch.rand(1, hidden))
    inputs = torch.rand(5, 1, 2)
    expected, (h, c) = row_lstm(inputs, state, weights)
    found, after = shared_lstm(inputs, state, alone)
    for one, other in zip((found, *after), (expected, h, c), strict=True):
        torch.testing.assert_close(one, other)
