"""The step of linear gates on a CPU, forth and back, each in one pass over memory.

`gated.py` says what the step is, and has it in tensor operations for any device. With the names
used there, d = W - W_0, q = s r, lambda the gradient of W_{t+1}, u the update and f the flush gate:

    t_1 = -s g u (1 - u/2)       t_2 = -d f (1 - f)          dW_{t+1}/dz
    dJ/dx = C^T (lambda t)       dJ/dC = sum lambda t x^T    dJ/d(R y + b) = sum lambda t

and the rest follows from what x, f and the step itself hold of W, g, W_0, s, rho and r. Compiled by
numba when first called, and kept on disk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta.kernels import cpu_kernels

# Coordinates that are worked on together; what they add up to depends on it, not on the threads.
_BLOCK = 2**12
# Numbers that are summed over coordinates in the backward pass: two for R y + b, ten for C.
_SUMS = 12


class GateStep(NamedTuple):
    """What a step of linear gates is made of; see `gated.Gated`."""

    weight: Tensor
    """W, ``[rows, coordinates]``."""
    gradient: Tensor
    """g, likewise."""
    slow: Tensor
    """W_0, ``[coordinates]``, as the next three."""
    rate: Tensor
    """s."""
    decay: Tensor
    """rho."""
    scale: Tensor
    """r."""
    at_row: Tensor
    """R y + b, ``[rows, 2]``."""
    from_coordinate: Tensor
    """C, ``[2, 5]``, zeros for what is not seen."""
    mean_rms: Tensor
    """Scalar, a constant."""


def fits(step: GateStep) -> bool:
    """Whether these kernels take a step: on the CPU, all of one float type, not empty."""
    alike = all(tensor.dtype == step.weight.dtype for tensor in step)
    return alike and cpu_kernels.fits(step.slow.detach().contiguous())


def move(step: GateStep, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """W_{t+1}, and both gates summed over coordinates.

    Args:
        step: `fits` holds for it.
        overwrite: Write W_{t+1} over W, which is contiguous; there is then no derivative.

    Returns:
        ``[rows, coordinates]``, differentiable to everything but the last field; and ``[rows, 2]``,
        (update, flush), without a derivative.
    """
    if overwrite:
        return _write(step, step.weight.detach())
    moved, sums = _Move.apply(*step)
    return moved, sums


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        step = GateStep(*tensors)
        moved, sums = _write(step, torch.empty(step.weight.shape, dtype=step.weight.dtype))
        ctx.mark_non_differentiable(sums)
        return moved, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
        del of_sums
        step = GateStep(*ctx.saved_tensors)
        rows, count = step.weight.shape
        to_stacked = [
            torch.empty((rows if want else 0, count), dtype=incoming.dtype)
            for want in ctx.needs_input_grad[:2]
        ]
        to_flat = torch.zeros((4, count), dtype=incoming.dtype)
        sums = np.zeros((_blocks(count), rows, _SUMS))
        cpu_kernels._in_parallel(
            _back_all,
            _BLOCK,
            count,
            _stacked(incoming),
            *_arrays(step),
            *(tensor.numpy() for tensor in to_stacked),
            to_flat.numpy(),
            sums,
        )
        total = torch.from_numpy(sums.sum(0)).to(incoming)
        found = (
            *to_stacked,
            *to_flat,
            total[:, :2],
            total[:, 2:].sum(0).view_as(step.from_coordinate),
            None,
        )
        return tuple(
            gradient if want else None
            for gradient, want in zip(found, ctx.needs_input_grad, strict=True)
        )


def _write(step: GateStep, new: Tensor) -> tuple[Tensor, Tensor]:
    rows, count = step.weight.shape
    sums = np.zeros((_blocks(count), rows, 2))
    in_place = new.data_ptr() == step.weight.data_ptr()
    cpu_kernels._in_parallel(_move_all, _BLOCK, count, new.numpy(), *_arrays(step), in_place, sums)
    return new, torch.from_numpy(sums.sum(0)).to(new)


def _blocks(count: int) -> int:
    return -(-count // _BLOCK)


def _stacked(tensor: Tensor) -> Any:
    """As an array ``[rows, coordinates]``, one row for the same row many times."""
    tensor = tensor.detach()
    return (tensor[:1] if tensor.stride(0) == 0 else tensor).contiguous().numpy()


def _arrays(step: GateStep) -> tuple[Any, ...]:
    flat = (tensor.detach().contiguous().numpy() for tensor in step[2:8])
    numbers = (0.0, 1.0, _LARGEST, torch.finfo(step.weight.dtype).tiny, float(step.mean_rms))
    constants = np.array([*numbers, *_EXPONENTIAL])
    weight, gradient = _stacked(step.weight), _stacked(step.gradient)
    return weight, gradient, *flat, constants.astype(weight.dtype)


# ---- compiled ----

# e^z as ((Taylor series of e^(z / 128))^2)...^2, seven times: vectors have no exponential here.
# Exact at 0; within 1e-12 up to |z| = 30 in float64, 1e-5 in float32.
_LARGEST = 30.0
_EXPONENTIAL = (1 / 128, *(1 / float(np.prod(range(1, n + 1))) for n in range(2, 11)))


def _compiled(function: Any) -> Any:
    # Divisions that raise, and sums in a fixed order, would keep the loops from being vectorised.
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"contract", "reassoc"},
        "error_model": "numpy",
    }
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that the cache may be written to
        return njit(**options)(function)


@_compiled
def _exponential(z: Any, k: Any) -> Any:
    x = z * k[5]
    e = k[10] + x * (k[11] + x * (k[12] + x * (k[13] + x * k[14])))
    e = k[1] + x * (k[1] + x * (k[6] + x * (k[7] + x * (k[8] + x * (k[9] + x * e)))))
    e = e * e
    e = e * e
    e = e * e
    e = e * e
    e = e * e
    e = e * e
    return e * e


@_compiled
def _move_block(
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    scale: Any,
    at_row: Any,
    c: Any,
    k: Any,
    total: Any,
) -> None:
    zero, one, largest, tiny, mean = k[0], k[1], k[2], k[3], k[4]
    updates, flushes = zero, zero
    for i in range(weight.size):
        w, g, s, rho, r = weight[i], gradient[i], rate[i], decay[i], scale[i]
        q = s * r + tiny
        d = w - slow[i]
        push, pull = g / (abs(g) + r), d / (abs(d) + q)
        size, common = abs(w) / (abs(w) + q), r / (r + mean)
        z = at_row[0] + c[0, 0] * abs(push) + c[0, 1] * size + c[0, 2] * abs(pull)
        z += c[0, 3] * push * pull + c[0, 4] * common
        y = at_row[1] + c[1, 0] * abs(push) + c[1, 1] * size + c[1, 2] * abs(pull)
        y += c[1, 3] * push * pull + c[1, 4] * common
        z = largest if z > largest else (-largest if z < -largest else z)
        y = largest if y > largest else (-largest if y < -largest else y)
        update = (one + one) / (one + _exponential(-z, k))
        odds = _exponential(y, k)
        flush = rho * odds / (one + rho * (odds - one))
        weight[i] = w - flush * d - update * s * g
        updates += update
        flushes += flush
    total[0], total[1] = updates, flushes


@_compiled
def _move_all(
    new: Any,
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    scale: Any,
    at_row: Any,
    c: Any,
    k: Any,
    in_place: Any,
    sums: Any,
    start: Any,
    stop: Any,
) -> None:
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        for row in range(new.shape[0]):
            target = new[row, begin:end]
            if not in_place:
                target[:] = weight[row if weight.shape[0] > 1 else 0, begin:end]
            _move_block(
                target,
                gradient[row if gradient.shape[0] > 1 else 0, begin:end],
                slow[begin:end],
                rate[begin:end],
                decay[begin:end],
                scale[begin:end],
                at_row[row],
                c,
                k,
                sums[begin // _BLOCK, row],
            )


@_compiled
def _back_block(
    incoming: Any,
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    scale: Any,
    at_row: Any,
    c: Any,
    k: Any,
    to_weight: Any,
    to_gradient: Any,
    to_slow: Any,
    to_rate: Any,
    to_decay: Any,
    to_scale: Any,
    total: Any,
) -> None:
    zero, one, largest, tiny, mean = k[0], k[1], k[2], k[3], k[4]
    half = one / (one + one)
    sum_z, z_push, z_size, z_pull, z_home, z_common = zero, zero, zero, zero, zero, zero
    sum_y, y_push, y_size, y_pull, y_home, y_common = zero, zero, zero, zero, zero, zero
    for i in range(weight.size):
        later, w, g = incoming[i], weight[i], gradient[i]
        s, rho, r = rate[i], decay[i], scale[i]
        q = s * r + tiny
        d = w - slow[i]
        of_g, of_d = one / (abs(g) + r), one / (abs(d) + q)
        of_w, of_r = one / (abs(w) + q), one / (r + mean)
        push, pull, size, common = g * of_g, d * of_d, abs(w) * of_w, r * of_r
        z = at_row[0] + c[0, 0] * abs(push) + c[0, 1] * size + c[0, 2] * abs(pull)
        z += c[0, 3] * push * pull + c[0, 4] * common
        y = at_row[1] + c[1, 0] * abs(push) + c[1, 1] * size + c[1, 2] * abs(pull)
        y += c[1, 3] * push * pull + c[1, 4] * common
        z_counts = one if abs(z) <= largest else zero
        y_counts = one if abs(y) <= largest else zero
        z = largest if z > largest else (-largest if z < -largest else z)
        y = largest if y > largest else (-largest if y < -largest else y)
        update = (one + one) / (one + _exponential(-z, k))
        odds = _exponential(y, k)
        share = one / (one + rho * (odds - one))
        flush = rho * odds * share
        to_z = -z_counts * later * s * g * update * (one - half * update)
        to_y = -y_counts * later * d * flush * (one - flush)
        to_home = to_z * c[0, 3] + to_y * c[1, 3]
        sign_g = one if g > zero else (-one if g < zero else zero)
        sign_d = one if d > zero else (-one if d < zero else zero)
        sign_w = one if w > zero else (-one if w < zero else zero)
        by_push = ((to_z * c[0, 0] + to_y * c[1, 0]) * sign_g + to_home * pull) * of_g
        by_pull = ((to_z * c[0, 2] + to_y * c[1, 2]) * sign_d + to_home * push) * of_d
        by_size = (to_z * c[0, 1] + to_y * c[1, 1]) * of_w
        by_common = to_z * c[0, 4] + to_y * c[1, 4]
        to_d = by_pull * q * of_d
        to_q = -by_pull * pull - by_size * size
        to_weight[i] = later * (one - flush) + to_d + by_size * sign_w * q * of_w
        to_gradient[i] = by_push * r * of_g - later * update * s
        to_slow[i] += later * flush - to_d
        to_rate[i] += to_q * r - later * update * g
        to_decay[i] -= later * d * odds * share * share
        to_scale[i] += to_q * s - by_push * push + by_common * mean * of_r * of_r
        sum_z += to_z
        sum_y += to_y
        z_push += to_z * abs(push)
        z_size += to_z * size
        z_pull += to_z * abs(pull)
        z_home += to_z * push * pull
        z_common += to_z * common
        y_push += to_y * abs(push)
        y_size += to_y * size
        y_pull += to_y * abs(pull)
        y_home += to_y * push * pull
        y_common += to_y * common
    total[0], total[1] = sum_z, sum_y
    total[2], total[3], total[4], total[5], total[6] = z_push, z_size, z_pull, z_home, z_common
    total[7], total[8], total[9], total[10], total[11] = y_push, y_size, y_pull, y_home, y_common


@_compiled
def _back_all(
    incoming: Any,
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    scale: Any,
    at_row: Any,
    c: Any,
    k: Any,
    to_weight: Any,
    to_gradient: Any,
    to_flat: Any,
    sums: Any,
    start: Any,
    stop: Any,
) -> None:
    """What is not asked for is written to a block that nobody reads."""
    unread = np.empty((2, min(_BLOCK, stop - start)), slow.dtype)
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        for row in range(sums.shape[1]):
            _back_block(
                incoming[row if incoming.shape[0] > 1 else 0, begin:end],
                weight[row if weight.shape[0] > 1 else 0, begin:end],
                gradient[row if gradient.shape[0] > 1 else 0, begin:end],
                slow[begin:end],
                rate[begin:end],
                decay[begin:end],
                scale[begin:end],
                at_row[row],
                c,
                k,
                to_weight[row, begin:end] if to_weight.shape[0] > 0 else unread[0, : end - begin],
                to_gradient[row, begin:end]
                if to_gradient.shape[0] > 0
                else unread[1, : end - begin],
                to_flat[0, begin:end],
                to_flat[1, begin:end],
                to_flat[2, begin:end],
                to_flat[3, begin:end],
                sums[begin // _BLOCK, row],
            )
