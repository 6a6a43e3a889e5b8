"""Batch normalisation, ReLU and maxima over 2 x 2 as one operation that is differentiable twice.

One after the other they read and write every map several times, forth and back, and keep four
copies for the backward pass; this keeps the maps that came in.
`kernels/map_kernels.py` has the equations.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from metalm.meta.kernels import cpu_kernels, map_kernels

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
        if not self.fits(input, input.shape):
            maps = functional.relu(super().forward(input))
            return maps if self.window == 1 else functional.max_pool2d(maps, self.window)
        maps, _, mean, variance, _ = norm_relu_pool(
            input, self.weight, self.bias, *self.given(), self.window, self.eps
        )
        self.follow(mean, variance, input.numel() // input.shape[1])
        return maps

    def given(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mean and variance where they are not taken from the maps."""
        if self.training or self.running_mean is None or self.running_var is None:
            return None, None
        return self.running_mean, self.running_var

    def fits(self, input: Tensor, shape: Sequence[int]) -> bool:
        """Whether maps of this shape, of the input's type and place, are one operation."""
        known = input.device.type == "cpu" and input.dtype in _DTYPES and len(shape) == 4
        if not known or not self.affine or self.weight.dtype != input.dtype:
            return False
        # Cumulative averages, and shapes that torch refuses, are left to torch.
        counted = self.momentum is not None or not self.track_running_stats
        items, channels, *sides = shape
        several = items * sides[0] * sides[1] > 1 and min(items, *sides) >= 1
        own = channels == self.num_features
        return counted and several and own and min(sides) >= self.window and channels > 0

    @torch.no_grad()
    def follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Running statistics, where there are any, after maps of so many numbers a channel."""
        if not (self.training and self.track_running_stats):
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        unbiased = self.momentum * count / (count - 1)
        self.running_var.mul_(1 - self.momentum).add_(variance, alpha=unbiased)

    def extra_repr(self) -> str:
        """As of batch normalisation, and the window."""
        return f"{super().extra_repr()}, window={self.window}"


class Kept(NamedTuple):
    """What the way back needs. Every tensor may have a dimension for tasks in front of its own."""

    x: Tensor
    """Contiguous, ``[items, channels, height, width]``."""
    places: Tensor
    """uint8, like y; see `kernels/map_kernels.py`."""
    gamma: Tensor
    """``[channels]``."""
    mean: Tensor
    """float64, ``[channels]``, as the root."""
    root: Tensor


class Shape(NamedTuple):
    """What of an operation is no tensor."""

    window: int
    given: bool
    """Whether mean and variance are constants."""


def forth(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    window: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """(y, places, mean, variance, root), without history."""
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


def back(incoming: Tensor, kept: Kept, shape: Shape) -> tuple[Tensor, ...]:
    """Gradients of x, gamma and beta from that of y, without history."""
    kept = kept._replace(x=kept.x.contiguous())
    to_x = torch.empty_like(kept.x)
    to_gamma, to_beta = torch.empty_like(kept.root), torch.empty_like(kept.root)
    _over_channels(
        map_kernels.write_gradients,
        *_arrays(incoming, kept, shape),
        _maps(to_x),
        _channels(to_gamma),
        _channels(to_beta),
    )
    return to_x, to_gamma.to(kept.gamma.dtype), to_beta.to(kept.gamma.dtype)


def twice_back(
    incoming: Tensor, kept: Kept, shape: Shape, along: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of y's gradient, x and gamma from those of what `back` gives."""
    kept = kept._replace(x=kept.x.contiguous())
    to_x = torch.empty_like(kept.x)
    to_incoming = torch.empty_like(kept.places, dtype=kept.x.dtype)
    to_gamma = torch.empty_like(kept.root)
    of_x, of_gamma, of_beta = along
    _over_channels(
        map_kernels.write_second,
        *_arrays(incoming, kept, shape),
        _maps(of_x),
        _channels(of_gamma),
        _channels(of_beta),
        _maps(to_x),
        _maps(to_incoming),
        _channels(to_gamma),
    )
    return to_incoming, to_x, to_gamma.to(kept.gamma.dtype)


def norm_relu_pool(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """What `forth` gives, of its arguments; y is differentiable twice."""
    return cast("tuple[Tensor, ...]", _NormReluPool.apply(x, *others))


def of_known_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Torch asks at every call, and finding it out takes as long as the work on small maps."""
    setattr(function, "__signature__", inspect.signature(function))  # noqa: B010 - for mypy
    return function


class _NormReluPool(torch.autograd.Function):
    """(x, gamma, beta, mean, variance) -> (y, places, mean, variance, root), y differentiable."""

    forward = staticmethod(of_known_signature(forth))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, _, mean, variance, window, _ = inputs
        _, places, own_mean, _, root = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.shape = Shape(window, mean is not None and variance is not None)
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
    @of_known_signature
    def forward(
        incoming: Tensor,
        x: Tensor,
        places: Tensor,
        gamma: Tensor,
        mean: Tensor,
        root: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, ...]:
        return back(incoming, Kept(x, places, gamma, mean, root), shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        *tensors, ctx.shape = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        incoming, *kept = ctx.saved_tensors
        to_incoming, to_x, to_gamma = twice_back(incoming, Kept(*kept), ctx.shape, along)
        return to_incoming, to_x, None, to_gamma, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _side_by_side(_Gradient, info.batch_size, in_dims, inputs)


def _arrays(incoming: Tensor, kept: Kept, shape: Shape) -> tuple[Any, ...]:
    """The arguments that both gradients begin with."""
    items, _, height, width = kept.x.shape[-4:]
    share = 0.0 if shape.given else 1 / (items * height * width)
    return (
        _maps(kept.x),
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
    maps = tensor.detach().reshape(-1, items, channels, height * width)
    return maps.contiguous().numpy()  # no copy of what is written to, which is in one piece


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
