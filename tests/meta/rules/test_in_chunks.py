"""A function on chunks against the same function on everything at once."""

import pytest
import torch

from metalm.meta.rules.in_chunks import Operands, in_chunks

ROWS, UNITS = 3, 11


def mixture(operands):
    """Two outputs, one with a dimension of its own, of operands that are used unevenly."""
    weight, state = operands.stacked
    slow, bias = operands.flat
    matrix, of_row, unused = operands.shared
    del unused
    following = torch.tanh(state @ matrix + of_row[:, None, :]) * bias
    moved = weight * slow.sin() + following.sum(-1)
    return (moved, following), weight.detach().sum(1)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(8)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return Operands(
        [normal(ROWS, UNITS), normal(ROWS, UNITS, 4)],
        [normal(UNITS), normal(UNITS, 4)],
        [normal(4, 4), normal(ROWS, 4), normal(2)],
    )


def leaves_of(operands):
    return [tensor for kind in operands for tensor in kind]


@pytest.mark.parametrize("size", [0, 1, 4, 11, 50])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_like_one_call_forth_and_back(size, used, operands):
    expected, expected_total = mixture(operands)
    found, total = in_chunks(mixture, operands, size)
    torch.testing.assert_close(total, expected_total, rtol=1e-14, atol=1e-14)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    gradients = [
        torch.autograd.grad(
            sum(outputs[i].cos().sum() for i in used),
            leaves_of(operands),
            allow_unused=True,
            materialize_grads=True,
        )
        for outputs in (found, expected)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_operands_without_a_gradient_get_none(operands):
    operands.stacked[0].requires_grad_(False)
    operands.shared[1].requires_grad_(False)
    (moved, _), _ = in_chunks(mixture, operands, 4)
    moved.sum().backward()
    reached = [tensor.grad is not None for tensor in leaves_of(operands)]
    assert reached == [False, True, True, True, True, False, True]


def test_rows_that_share_their_memory(operands):
    shared = operands.stacked[0].detach()[:1].expand(ROWS, UNITS).requires_grad_()
    operands.stacked[0] = shared
    gradients = []
    for outputs in (in_chunks(mixture, operands, 3)[0], mixture(operands)[0]):
        gradients += torch.autograd.grad(outputs[0].sin().sum(), shared)
    torch.testing.assert_close(*gradients)


def test_written_over_an_operand(operands):
    expected, _ = mixture(operands)
    weight = operands.stacked[0].detach().clone()
    operands.stacked[0] = weight
    (moved, following), _ = in_chunks(mixture, operands, 4, into=[weight])
    assert moved.data_ptr() == weight.data_ptr()
    assert torch.equal(moved, expected[0])
    assert torch.equal(following, expected[1])
    assert not following.requires_grad


def test_only_the_operands_are_kept(operands):
    """What the function makes on the way is gone; at once, it would all be kept."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        in_chunks(mixture, operands, 4)
    ours = {tensor.data_ptr() for tensor in leaves_of(operands)}
    assert {tensor.data_ptr() for tensor in kept} == ours
