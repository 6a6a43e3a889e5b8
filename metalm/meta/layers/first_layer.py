"""A convolution of pictures, batch normalisation, ReLU and maxima, without the maps in between.

Where the pictures have few channels, their convolution is cheap and its maps are the largest of a
network. A batch normalisation takes one channel after the other, so that a block of channels goes
all the way from the pictures to the maxima before the next one comes; what lies between is worked
out again on the way back, in blocks, too, and never kept. The equations are those of
`kernels/map_kernels.py`, with

    x = kernel * pictures + bias      dkernel = pictures * dx      dbias = sum of dx

and, for u_kernel and u_bias the gradients of these two, the gradient of dx: u_kernel * pictures +
u_bias. Pictures that a gradient is asked for are not for this operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from metalm.meta.layers.norm_relu_pool import (
    Kept,
    NormReluPool,
    Shape,
    back,
    forth,
    norm_relu_pool,
    of_known_signature,
    twice_back,
)

MOST_CHANNELS = 4
"""Of the pictures; from more of them a convolution is no longer cheap beside the rest."""

# Blocks are multiples of so many channels, as vectorised convolutions want them, and of at most so
# many bytes where that allows more than one multiple.
_MULTIPLE, _BLOCK = 16, 1 << 20


def is_first(convolution: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether these two, one after the other, can be this operation, for pictures that fit."""
    return (
        type(convolution) is nn.Conv2d
        and type(norm) is NormReluPool
        and convolution.in_channels <= MOST_CHANNELS
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and convolution.out_channels == norm.num_features
    )


def first_layer(pictures: Tensor, convolution: nn.Conv2d, norm: NormReluPool) -> Tensor:
    """What ``norm(convolution(pictures))`` is; `is_first` holds for the two.

    Args:
        pictures: ``[items, channels, height, width]``.
        convolution: whose tensors are used.
        norm: likewise; its running statistics are updated.

    Returns:
        Maps, as by `NormReluPool`.
    """
    setting = _Setting.of(convolution, norm)
    if not _fits(pictures, convolution, norm, setting):
        return cast(Tensor, norm(convolution(pictures)))
    mean, variance = norm.given()
    maps, _, mean, variance, _ = _FirstLayer.apply(
        pictures,
        convolution.weight,
        convolution.bias,
        norm.weight,
        norm.bias,
        mean,
        variance,
        setting,
    )
    height, width = setting.sides(pictures, convolution.weight)
    norm.follow(mean, variance, len(pictures) * height * width)
    return maps


class _Setting(NamedTuple):
    """What of the operation is no tensor."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    window: int
    eps: float

    @classmethod
    def of(cls, convolution: nn.Conv2d, norm: NormReluPool) -> _Setting:
        assert not isinstance(convolution.padding, str)
        return cls(
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            norm.window,
            norm.eps,
        )

    def sides(self, pictures: Tensor, kernel: Tensor) -> tuple[int, ...]:
        """Height and width of the convolution's maps."""
        each = zip(
            pictures.shape[2:],
            kernel.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return tuple(
            (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for side, taps, stride, padding, dilation in each
        )

    def convolved(self, pictures: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution's maps, in the type of the pictures on the way back, too."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.convolved(pictures, kernel, bias)
        return functional.conv2d(pictures, kernel, bias, self.stride, self.padding, self.dilation)

    def gradients(self, to_x: Tensor, pictures: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Of the kernel and the bias."""
        _, to_kernel, to_bias = torch.ops.aten.convolution_backward(
            to_x,
            pictures,
            kernel,
            [len(kernel)],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            1,
            [False, True, True],
        )
        return to_kernel, to_bias

    def blocks(self, pictures: Tensor, kernel: Tensor) -> Iterator[slice]:
        """The channels, some at a time."""
        height, width = self.sides(pictures, kernel)
        bytes_each = len(pictures) * height * width * pictures.element_size() * _MULTIPLE
        width = _MULTIPLE * max(1, _BLOCK // bytes_each)
        return (slice(start, start + width) for start in range(0, len(kernel), width))


def _fits(pictures: Tensor, convolution: nn.Conv2d, norm: NormReluPool, setting: _Setting) -> bool:
    if pictures.dim() != 4 or pictures.requires_grad or torch.is_autocast_enabled("cpu"):
        return False
    if pictures.shape[1] != convolution.in_channels or pictures.dtype != convolution.weight.dtype:
        return False
    sides = setting.sides(pictures, convolution.weight)
    return norm.fits(pictures, (len(pictures), convolution.out_channels, *sides))


class _FirstLayer(torch.autograd.Function):
    """(pictures, kernel, bias, gamma, beta, mean, variance) -> as `norm_relu_pool.forth`."""

    @staticmethod
    @of_known_signature
    def forward(
        pictures: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        setting: _Setting,
    ) -> tuple[Tensor, ...]:
        found = []
        for block in setting.blocks(pictures, kernel):
            x = setting.convolved(pictures, kernel[block], _part(bias, block))
            moments = _part(mean, block), _part(variance, block)
            found.append(forth(x, gamma[block], beta[block], *moments, setting.window, setting.eps))
        y, places, *of_channels = zip(*found, strict=True)
        joined = (_joined(parts) for parts in of_channels)
        return _joined(y, 1), _joined(places, 1), *joined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pictures, kernel, bias, gamma, _, mean, variance, ctx.setting = inputs
        _, places, own_mean, _, root = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.given = mean is not None and variance is not None
        ctx.save_for_backward(pictures, kernel, bias, places, gamma, own_mean, root)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if incoming is None:
            return (None,) * 8
        to_kernel, to_bias, *to_norm = _Gradient.apply(
            incoming, *ctx.saved_tensors, ctx.setting, ctx.given
        )
        _, _, bias, *_ = ctx.saved_tensors
        return None, to_kernel, None if bias is None else to_bias, *to_norm, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        """Side by side, tasks go the way of the two modules."""
        del info
        *tensors, setting = inputs

        def apart(pictures: Tensor, kernel: Tensor, bias: Tensor | None, *others: Any) -> Any:
            maps = setting.convolved(pictures, kernel, bias)
            return norm_relu_pool(maps, *others, setting.window, setting.eps)

        found = torch.func.vmap(apart, in_dims[:-1])(*tensors)
        return found, (0,) * len(found)


class _Gradient(torch.autograd.Function):
    """(gradient of y, what was kept) -> gradients of kernel, bias, gamma, beta; once more."""

    @staticmethod
    @of_known_signature
    def forward(
        incoming: Tensor,
        pictures: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        places: Tensor,
        gamma: Tensor,
        mean: Tensor,
        root: Tensor,
        setting: _Setting,
        given: bool,
    ) -> tuple[Tensor, ...]:
        found = []
        for block in setting.blocks(pictures, kernel):
            x = setting.convolved(pictures, kernel[block], _part(bias, block))
            kept = Kept(x, places[:, block], gamma[block], mean[block], root[block])
            to_x, *to_norm = back(incoming[:, block], kept, Shape(setting.window, given))
            found.append((*setting.gradients(to_x, pictures, kernel[block]), *to_norm))
        return tuple(_joined(parts) for parts in zip(*found, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        *tensors, ctx.setting, ctx.given = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        incoming, pictures, kernel, bias, places, gamma, mean, root = ctx.saved_tensors
        of_kernel, of_bias, of_gamma, of_beta = along
        setting: _Setting = ctx.setting
        found = []
        for block in setting.blocks(pictures, kernel):
            x = setting.convolved(pictures, kernel[block], _part(bias, block))
            of_x = setting.convolved(pictures, of_kernel[block], of_bias[block])
            kept = Kept(x, places[:, block], gamma[block], mean[block], root[block])
            to_maps, to_x, to_gamma = twice_back(
                incoming[:, block],
                kept,
                Shape(setting.window, ctx.given),
                (of_x, of_gamma[block], of_beta[block]),
            )
            found.append((to_maps, *setting.gradients(to_x, pictures, kernel[block]), to_gamma))
        to_incoming, *of_channels = zip(*found, strict=True)
        to_kernel, to_bias, to_gamma = (_joined(parts) for parts in of_channels)
        return (
            _joined(to_incoming, 1),
            None,
            to_kernel,
            None if bias is None else to_bias,
            None,
            to_gamma,
            *(None,) * 4,
        )


def _part(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[block]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
