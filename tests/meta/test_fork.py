"""Forward and backward copies share memory; truncation keeps numbers and the way to W_0."""

import pytest
import torch

from metalm.meta.fork import forward_copy, rebase, stack_rows


def test_forward_copies_are_leaves_in_the_same_memory():
    source = torch.randn(3, 2, requires_grad=True)
    backward = {"a": source * 2, "b": source}
    forward = forward_copy(backward)
    for name, tensor in forward.items():
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert tensor.data_ptr() == backward[name].data_ptr()
    forward["a"].sum().backward()
    assert source.grad is None


def test_stacked_rows_are_a_view_whose_gradient_is_summed():
    slow = {"w": torch.randn(2, 3, dtype=torch.float64, requires_grad=True)}
    fast = stack_rows(slow, 4)["w"]
    assert fast.shape == (4, 2, 3)
    assert fast.data_ptr() == slow["w"].data_ptr()
    factors = torch.randn(4, 2, 3, dtype=torch.float64)
    (fast * factors).sum().backward()
    torch.testing.assert_close(slow["w"].grad, factors.sum(0))


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        stack_rows({"w": torch.zeros(2)}, 0)


@pytest.mark.parametrize("rows", [None, 3])
def test_rebase_is_the_displacement_held_constant(rows):
    torch.manual_seed(1)
    slow = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    shape = (2, 5) if rows is None else (rows, 2, 5)
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    fast = slow - rate * torch.randn(shape, dtype=torch.float64)
    based = rebase({"w": fast}, {"w": slow})["w"]
    assert torch.equal(based, fast)
    assert based.data_ptr() == fast.data_ptr()
    factors = torch.randn(shape, dtype=torch.float64)
    to_slow, to_rate = torch.autograd.grad(
        (based.square() * factors).sum(), [slow, rate], allow_unused=True
    )
    plain = slow + (fast - slow).detach()
    (expected,) = torch.autograd.grad((plain.square() * factors).sum(), [slow])
    torch.testing.assert_close(to_slow, expected)
    assert to_rate is None
