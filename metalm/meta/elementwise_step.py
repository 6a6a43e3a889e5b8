"""The step that most rules come down to, W <- W - s g + rho (W_0 - W), and its derivative."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.kernels import cpu_kernels, tensor_kernels
from metalm.meta.kernels.gpu_support import kernels_in
from metalm.meta.kernels.step_gradients import Steps, Wanted

Number = Tensor | float

# Numbers up to which one tensor operation takes less time than the way into the kernels.
_FEW = 2**16


def step(
    weight: Tensor, gradient: Tensor, slow: Tensor, rate: Number, decay: Number | None
) -> Tensor:
    """W - s g + rho (W_0 - W), differentiable in W, g, W_0, s and rho.

    Args:
        weight: W, ``[*shape]`` or ``[rows, *shape]``.
        gradient: g, like ``weight``.
        slow: W_0, ``[*shape]``.
        rate: s, broadcastable to ``[*shape]``.
        decay: rho, broadcastable to ``[*shape]``; None for no decay.

    Returns:
        A new tensor like ``weight``.
    """
    if decay is None and weight.numel() <= _FEW:
        if isinstance(rate, Tensor):
            return torch.addcmul(weight, rate, gradient, value=-1)
        return torch.sub(weight, gradient, alpha=rate)
    rate = as_tensor(rate, weight)
    decay = None if decay is None else as_tensor(decay, weight)
    new: Tensor = _Step.apply(weight, gradient, slow, rate, decay)
    return new


def as_tensor(number: Number, like: Tensor) -> Tensor:
    """A number as a tensor of this dtype and device; a tensor stays the tensor it is.

    A GPU writes the number itself, so that nobody waits and a graph may be captured of it.
    """
    if isinstance(number, Tensor):
        return number.to(like)
    return torch.full((), number, dtype=like.dtype, device=like.device)


def kernels_for(tensor: Tensor) -> ModuleType:
    """The kernels that suit where a tensor lives, of which `tensor_kernels` suit everywhere."""
    if cpu_kernels.fits(tensor):
        return cpu_kernels
    gpu_kernels = kernels_in("metalm.meta.kernels.gpu_kernels") if tensor.is_cuda else None
    return gpu_kernels if gpu_kernels is not None and gpu_kernels.fits(tensor) else tensor_kernels


def memory_like(tensor: Tensor) -> Tensor:
    """Contiguous memory of its own, also where the tensor is the same row many times."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@torch.no_grad()
def write_step(
    new: Tensor,
    weight: Tensor,
    gradient: Tensor,
    slow: Tensor,
    rate: Number,
    decay: Number | None,
) -> None:
    """`step` without a derivative, into ``new``, which may be ``weight``; the same bits."""
    if decay is None and weight.numel() <= _FEW:
        if isinstance(rate, Tensor):
            torch.addcmul(weight, rate, gradient, value=-1, out=new)
        else:
            torch.sub(weight, gradient, alpha=rate, out=new)
        return
    rate = as_tensor(rate, new)
    decay = None if decay is None else as_tensor(decay, new)
    kernels_for(new).write_step(new, weight, gradient, slow, rate, decay)


class _Step(torch.autograd.Function):
    """`step`; its derivative is a sweep back over this one step."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gradient: Tensor, slow: Tensor, rate: Tensor, decay: Tensor | None
    ) -> Tensor:
        new = memory_like(weight)
        write_step(new, weight, gradient, slow, rate, decay)
        to_decay = ctx.needs_input_grad[4]
        ctx.save_for_backward(gradient, weight if to_decay else None, slow, rate, decay)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight, slow, rate, decay = ctx.saved_tensors
        to_weight, to_gradient, *others = ctx.needs_input_grad
        steps = Steps([gradient], [0.0], slow, rate, decay, weight, truncated=False)
        found = kernels_for(slow).sweep(steps, incoming, Wanted(to_weight, *others))
        to_gradient = (incoming * rate).neg_() if to_gradient else None
        return found.first, to_gradient, *found.of_shapes(rate, decay)
