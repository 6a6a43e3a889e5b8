"""Batch normalisation, ReLU and maxima over 2 x 2 as one operation that is differentiable twice.

One after the other they read and write every map several times, forth and back, and keep four
copies for the backward pass; this keeps the maps that came in. `map_kernels.py` has the equations.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from metalm.meta import cpu_kernels, map_kernels

WINDOWS = (1, 2)
_DTYPES = (torch.float32, torch.float64)


class NormReluPool(nn.BatchNorm2d):
    """y = maxima over windows of max(0, batch normalisation of x); as three modules, in one.

    The names of its tensors, its running statistics and its mode are those of ``nn.BatchNorm2d``,
    and ties and sides that are no multiple of the window are dealt with as by ``nn.MaxPool2d``. On
    a CPU in float32 or float64 it is one operation; elsewhere it calls the three.

    Args:
        width: channels.
        window: 1 for no maxima, 2 for maxima over 2 x 2.
        **options: of ``nn.BatchNorm2d``.

    Raises:
        ValueError: another window.
    """

    def __init__(self, width: int, window: int = 2, **options: Any) -> None:
        super().__init__(width, **options)
        if window not in WINDOWS:
            raise ValueError(
                f"no maxima over such windows; expected a window of 1 or 2, found {window}; do use "
                "the modules of torch one after the other"
            )
        self.window = window

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, window: int) -> NormReluPool:
        """With the tensors of a batch normalisation, which are shared, and its settings."""
        made: Any = copy.copy(norm)
        made.__class__, made.window = cls, window
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Maps [items, width, height // window, ...] of maps [items, width, height, ...]."""
        if not self._fits(input):
            maps = functional.relu(super().forward(input))
            return maps if self.window == 1 else functional.max_pool2d(maps, self.window)
        given = not self.training and self.running_mean is not None
        mean, variance = (self.running_mean, self.running_var) if given else (None, None)
        maps, _, mean, variance, _ = _NormReluPool.apply(
            input, self.weight, self.bias, mean, variance, self.window, self.eps
        )
        if self.training and self.track_running_stats:
            self._follow(mean, variance, input)
        return maps

    def extra_repr(self) -> str:
        """As of batch normalisation, and the window."""
        return f"{super().extra_repr()}, window={self.window}"

    def _fits(self, input: Tensor) -> bool:
        known = input.device.type == "cpu" and input.dtype in _DTYPES and input.dim() == 4
        if not known or not self.affine or self.weight.dtype != input.dtype:
            return False
        # Cumulative averages, and shapes that torch refuses, are left to torch.
        counted = self.momentum is not None or not self.track_running_stats
        items, _, *sides = input.shape
        several = items * sides[0] * sides[1] > 1 and min(items, *sides) >= 1
        return counted and several and min(sides) >= self.window and input.shape[1] > 0

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, input: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        count = input.numel() // input.shape[1]
        self.num_batches_tracked.add_(1)
        self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        unbiased = self.momentum * count / (count - 1)
        self.running_var.mul_(1 - self.momentum).add_(variance, alpha=unbiased)


class _Kept(NamedTuple):
    """What the way back needs. Every tensor may have a dimension for tasks in front of its own."""

    x: Tensor
    """Contiguous, ``[items, channels, height, width]``."""
    places: Tensor
    """uint8, like y; see `map_kernels.py`."""
    gamma: Tensor
    """``[channels]``."""
    mean: Tensor
    """float64, ``[channels]``, as the root."""
    root: Tensor


class _Shape(NamedTuple):
    """What of an operation is no tensor."""

    window: int
    given: bool
    """Whether mean and variance are constants."""


def _of_known_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Torch asks at every call, and finding it out takes as long as the work on small maps."""
    setattr(function, "__signature__", inspect.signature(function))  # noqa: B010 - for mypy
    return function


class _NormReluPool(torch.autograd.Function):
    """(x, gamma, beta, mean, variance) -> (y, places, mean, variance, root), y differentiable."""

    @staticmethod
    @_of_known_signature
    def forward(
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        window: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        *lead, channels, height, width = x.shape
        given = mean is not None and variance is not None
        shape = (*lead, channels, height // window, width // window)
        y = x.new_empty(shape)
        places = torch.empty(shape, dtype=torch.uint8)
        of_channels = (*lead[:-1], channels)
        own_mean, own_variance, root = torch.empty((3, *of_channels), dtype=torch.float64)
        if mean is not None and variance is not None:
            own_mean.copy_(mean)
            own_variance.copy_(variance)
        _over_channels(
            map_kernels.write_maps,
            _maps(x),
            width,
            window,
            *(_channels(tensor) for tensor in (gamma, beta, own_mean, own_variance)),
            given,
            eps,
            _channels(root),
            _maps(y),
            _maps(places),
        )
        return y, places, own_mean, own_variance, root

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, _, mean, variance, window, _ = inputs
        _, places, own_mean, _, root = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.shape = _Shape(window, mean is not None and variance is not None)
        ctx.save_for_backward(x, places, gamma, own_mean, root)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if incoming is None:
            return (None,) * 7
        found = _Gradient.apply(incoming, *ctx.saved_tensors, ctx.shape)
        return *found, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _side_by_side(_NormReluPool, info.batch_size, in_dims, inputs)


class _Gradient(torch.autograd.Function):
    """(gradient of y, what was kept) -> gradients of x, gamma and beta, differentiable once."""

    @staticmethod
    @_of_known_signature
    def forward(
        incoming: Tensor,
        x: Tensor,
        places: Tensor,
        gamma: Tensor,
        mean: Tensor,
        root: Tensor,
        shape: _Shape,
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        to_x = torch.empty_like(x)
        to_gamma, to_beta = torch.empty_like(root), torch.empty_like(root)
        _over_channels(
            map_kernels.write_gradients,
            *_arrays(x, incoming, _Kept(x, places, gamma, mean, root), shape),
            _maps(to_x),
            _channels(to_gamma),
            _channels(to_beta),
        )
        return to_x, to_gamma.to(gamma.dtype), to_beta.to(gamma.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        *tensors, ctx.shape = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_x: Tensor, to_gamma: Tensor, to_beta: Tensor
    ) -> tuple[Tensor | None, ...]:
        incoming, x, places, gamma, mean, root = ctx.saved_tensors
        x = x.contiguous()
        back = torch.empty_like(x)
        back_incoming = torch.empty_like(places, dtype=x.dtype)
        back_gamma = torch.empty_like(root)
        _over_channels(
            map_kernels.write_second,
            *_arrays(x, incoming, _Kept(x, places, gamma, mean, root), ctx.shape),
            _maps(to_x),
            _channels(to_gamma),
            _channels(to_beta),
            _maps(back),
            _maps(back_incoming),
            _channels(back_gamma),
        )
        return back_incoming, back, None, back_gamma.to(gamma.dtype), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _side_by_side(_Gradient, info.batch_size, in_dims, inputs)


def _arrays(x: Tensor, incoming: Tensor, kept: _Kept, shape: _Shape) -> tuple[Any, ...]:
    """The arguments that both gradients begin with."""
    items, _, height, width = x.shape[-4:]
    share = 0.0 if shape.given else 1 / (items * height * width)
    return (
        _maps(x),
        width,
        shape.window,
        _maps(incoming),
        _maps(kept.places),
        _channels(kept.gamma),
        _channels(kept.mean),
        _channels(kept.root),
        share,
    )


def _over_channels(kernel: Any, x: Any, *arguments: Any) -> None:
    cpu_kernels._in_parallel(kernel, 1, x.shape[0] * x.shape[2], x, *arguments)


def _maps(tensor: Tensor) -> Any:
    """As an array [tasks, items, channels, numbers of a map]."""
    items, channels, height, width = tensor.shape[-4:]
    return tensor.detach().reshape(-1, items, channels, height * width).numpy()


def _channels(tensor: Tensor) -> Any:
    """As an array [tasks, channels]."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).numpy()


def _side_by_side(
    operation: Any, tasks: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> Any:
    """The operation on tensors that all have a dimension for tasks, in front."""

    def in_front(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.expand(tasks, *value.shape) if dim is None else value.movedim(dim, 0)

    found = operation.apply(*map(in_front, inputs, in_dims))
    return found, (0,) * len(found)
