"""The loops of the step W <- W - s g + rho (W_0 - W) on a CPU, each in one pass over memory.

Fast weights have a copy for each row and live in main memory. Here each number of W and of every
g_t is read once: the backward sweep holds lambda, mu and the sums over rows in the cache while it
goes back through all steps of a block of coordinates. Compiled by numba when first called, and kept
on disk. `tensor_kernels.py` has the same functions in tensor operations, for any device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from metalm.meta.kernels.step_gradients import StepGradients, Steps, TraceSums, Wanted

# Coordinates that are worked on together. Measured with 1 MiB of L2: the step streams best over
# long blocks, the sweep wants its eight buffers in L2.
STEP_BLOCK = 2**16
SWEEP_BLOCK = 2**12

_DTYPES = (torch.float32, torch.float64)


def fits(tensor: Tensor) -> bool:
    """Whether these kernels take a tensor: on the CPU, float32 or 64, contiguous, not empty."""
    known = tensor.device.type == "cpu" and tensor.dtype in _DTYPES
    return known and tensor.is_contiguous() and tensor.numel() > 0


def write_step(
    new: Tensor, weight: Tensor, gradient: Tensor, slow: Tensor, rate: Tensor, decay: Tensor | None
) -> None:
    """W - s g + rho (W_0 - W) into ``new``, which may be ``weight``; `fits` holds for ``new``.

    Args:
        new: ``[*shape]`` or ``[rows, *shape]``, written.
        weight: W, like ``new``.
        gradient: g, like ``new``.
        slow: W_0, ``[*shape]``.
        rate: s, broadcastable to ``[*shape]``.
        decay: rho, broadcastable to ``[*shape]``; None for no decay.
    """
    in_place = new.data_ptr() == weight.data_ptr()
    rows = _Rows(slow)
    _in_parallel(
        _write_step,
        STEP_BLOCK,
        slow.numel(),
        rows.of(new),
        rows.of(new if in_place else weight),
        rows.of(gradient),
        _flat(slow),
        _coefficient(rate, slow),
        _coefficient(decay, slow),
        in_place,
    )


def sweep(steps: Steps, incoming: Tensor | None, wanted: Wanted) -> StepGradients:
    """Go back through the steps; see `tensor_kernels.sweep`. `fits` holds for W_0."""
    slow, rows = steps.slow, _Rows(steps.slow)
    gradients = [gradient.contiguous() for gradient in steps.gradients]  # these are pointed to
    found = StepGradients(
        torch.empty_like(gradients[0]) if wanted.first else None,
        *(torch.empty_like(slow) if want else None for want in wanted[1:]),
    )
    _in_parallel(
        _sweep,
        SWEEP_BLOCK,
        slow.numel(),
        np.array([gradient.data_ptr() for gradient in reversed(gradients)], dtype=np.int64),
        np.array(steps.weights[::-1], dtype=rows.dtype),
        gradients[0].numel() // slow.numel(),
        _flat(slow),
        _coefficient(steps.rate, slow),
        _coefficient(steps.decay, slow),
        rows.of(steps.start),
        steps.truncated,
        rows.of(incoming),
        *(rows.of(tensor) for tensor in found),
    )
    return found


def write_traced_step(
    weight: Tensor,
    gradient: Tensor,
    slow: Tensor,
    rate: Tensor,
    decay: Tensor | None,
    trace: Tensor | None,
    sums: TraceSums,
    share: float,
) -> None:
    """See `tensor_kernels.write_traced_step`; `fits` holds for ``weight``."""
    rows = _Rows(slow)
    _in_parallel(
        _write_traced_step,
        STEP_BLOCK,
        slow.numel(),
        rows.of(weight),
        rows.of(gradient),
        _flat(slow),
        _coefficient(rate, slow),
        _coefficient(decay, slow),
        rows.of(trace),
        *(rows.of(total) for total in sums),
        rows.dtype.type(share),
    )


# ---- tensors as arrays ----


class _Rows:
    """Views ``[rows, coordinates]`` of tensors ``[*shape]`` or ``[rows, *shape]``."""

    def __init__(self, slow: Tensor) -> None:
        self.dim, self.count = slow.dim(), slow.numel()
        self.dtype = slow.new_empty(0).numpy().dtype

    def of(self, tensor: Tensor | None) -> Any:
        """The view; one row for the same row many times, none for no tensor."""
        if tensor is None:
            return np.empty((0, self.count), dtype=self.dtype)
        if tensor.dim() > self.dim and tensor.stride(0) == 0:
            tensor = tensor[:1]
        return tensor.detach().contiguous().view(-1, self.count).numpy()


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).numpy()


def _coefficient(number: Tensor | None, slow: Tensor) -> Any:
    """One number, or one for each coordinate; None is 0."""
    if number is None:
        return slow.new_zeros(1).numpy()
    return _flat(number if number.numel() == 1 else number.expand_as(slow))


# ---- threads ----


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="metalm-kernels")


def _in_parallel(kernel: Callable[..., None], block: int, count: int, *arguments: Any) -> None:
    """Share the coordinates among torch's number of threads, each a whole number of blocks.

    A coordinate's result depends on its place in its block alone, so not on the number of threads.
    """
    blocks = -(-count // block)
    threads = min(torch.get_num_threads(), blocks)
    if threads <= 1:
        kernel(*arguments, 0, count)
        return
    cuts = [min(count, blocks * i // threads * block) for i in range(threads + 1)]
    calls = [
        _pool(threads).submit(kernel, *arguments, start, stop) for start, stop in pairwise(cuts)
    ]
    for call in calls:
        call.result()


# ---- compiled ----


def _compiled(function: Any) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that the cache may be written to
        return njit(**options)(function)


def _typed_pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer that carray takes."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_typed_pointer)


# The innermost loops are functions of their own, which LLVM vectorises after a check that their
# arrays do not overlap.


@_compiled
def _copy(target: Any, source: Any) -> None:
    for i in range(target.size):
        target[i] = source[i]


@_compiled
def _step(weight: Any, gradient: Any, slow: Any, rate: Any, decay: Any) -> None:
    for i in range(weight.size):
        w = weight[i]
        weight[i] = w - rate[i] * gradient[i] + decay[i] * (slow[i] - w)


@_compiled
def _write_step(
    new: Any,
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    in_place: Any,
    start: Any,
    stop: Any,
) -> None:
    longest = min(STEP_BLOCK, stop - start)
    same_rate, same_decay = np.full(longest, rate[0]), np.full(longest, decay[0])
    for begin in range(start, stop, STEP_BLOCK):
        end = min(begin + STEP_BLOCK, stop)
        rates = rate[begin:end] if rate.size > 1 else same_rate
        decays = decay[begin:end] if decay.size > 1 else same_decay
        for row in range(new.shape[0]):
            target = new[row, begin:end]
            if not in_place:
                _copy(target, weight[row if weight.shape[0] > 1 else 0, begin:end])
            _step(
                target,
                gradient[row if gradient.shape[0] > 1 else 0, begin:end],
                slow[begin:end],
                rates,
                decays,
            )


@_compiled
def _traced_step(
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    trace: Any,
    to_rate: Any,
    to_decay: Any,
    to_slow: Any,
    share: Any,
) -> None:
    for i in range(weight.size):
        w, g, rho, later = weight[i], gradient[i], decay[i], trace[i]
        away, counted = w - slow[i], share * g
        to_rate[i] += counted * away
        to_decay[i] += counted * later
        to_slow[i] += counted
        trace[i] = later - rho * later - away
        weight[i] = w - rate[i] * g + rho * (slow[i] - w)


@_compiled
def _write_traced_step(
    weight: Any,
    gradient: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    trace: Any,
    to_rate: Any,
    to_decay: Any,
    to_slow: Any,
    share: Any,
    start: Any,
    stop: Any,
) -> None:
    """What is not asked for is written to a block that nobody reads."""
    longest = min(STEP_BLOCK, stop - start)
    same_rate, same_decay = np.full(longest, rate[0]), np.full(longest, decay[0])
    unread = (np.zeros_like(same_rate), np.zeros_like(same_rate), np.zeros_like(same_rate))
    untraced = np.zeros_like(same_rate)
    for begin in range(start, stop, STEP_BLOCK):
        end = min(begin + STEP_BLOCK, stop)
        size = end - begin
        untraced[:] = 0
        for row in range(weight.shape[0]):
            _traced_step(
                weight[row, begin:end],
                gradient[row if gradient.shape[0] > 1 else 0, begin:end],
                slow[begin:end],
                rate[begin:end] if rate.size > 1 else same_rate[:size],
                decay[begin:end] if decay.size > 1 else same_decay[:size],
                trace[row, begin:end] if trace.shape[0] > 0 else untraced[:size],
                to_rate[0, begin:end] if to_rate.shape[0] > 0 else unread[0][:size],
                to_decay[0, begin:end] if to_decay.shape[0] > 0 else unread[1][:size],
                to_slow[0, begin:end] if to_slow.shape[0] > 0 else unread[2][:size],
                share,
            )


@_compiled
def _back(
    lambda_: Any, mu: Any, keep: Any, a: Any, b: Any, c: Any, gradients: Any, weights: Any
) -> None:
    """Some steps back, the last first, with everything but the gradients in registers.

    Adds lambda g to a, lambda to b and mu g to c; then moves mu and lambda on.
    """
    for i in range(gradients[0].size):
        later, total, share = lambda_[i], mu[i], keep[i]
        x, y, z = a[i], b[i], c[i]
        for step in range(len(gradients)):
            gradient = gradients[step][i]
            x += later * gradient
            y += later
            z += total * gradient
            total = later + share * total
            later = weights[step] * gradient + share * later
        lambda_[i], mu[i] = later, total
        a[i], b[i], c[i] = x, y, z


@_compiled
def _part(address: Any, like: Any, rows: Any, row: Any, begin: Any, end: Any) -> Any:
    """A part of a row of the gradient ``[rows, coordinates]`` at an address."""
    return carray(_pointer(address), (rows, like.size), like.dtype)[row, begin:end]


@_compiled
def _add(target: Any, source: Any) -> None:
    for i in range(source.size):
        target[i] += source[i]


@_compiled
def _subtract_product(target: Any, left: Any, right: Any, less: Any) -> None:
    for i in range(right.size):
        target[i] -= left[i] * (right[i] - less[i])


@_compiled
def _write_product(target: Any, left: Any, right: Any, more: Any) -> None:
    for i in range(target.size):
        target[i] = left[i] * right[i] + more[i]


@_compiled
def _write_negative(target: Any, source: Any) -> None:
    for i in range(target.size):
        target[i] = -source[i]


@_compiled
def _write_complement(target: Any, source: Any) -> None:
    for i in range(source.size):
        target[i] = 1 - source[i]


@_compiled
def _buffer(like: Any, size: Any) -> Any:
    return np.empty(size, like.dtype)


@_compiled
def _sweep(  # noqa: C901 - one pass over memory is one function
    addresses: Any,
    weights: Any,
    rows: Any,
    slow: Any,
    rate: Any,
    decay: Any,
    begun: Any,
    truncated: Any,
    incoming: Any,
    to_first: Any,
    to_slow: Any,
    to_rate: Any,
    to_decay: Any,
    start: Any,
    stop: Any,
) -> None:
    longest = min(SWEEP_BLOCK, stop - start)
    same_rate, same_decay = np.full(longest, rate[0]), np.full(longest, decay[0])
    lambda_, mu, keep = _buffer(slow, longest), _buffer(slow, longest), _buffer(slow, longest)
    lambda_gradient, lambda_sum = _buffer(slow, longest), _buffer(slow, longest)
    mu_gradient, mu_start = _buffer(slow, longest), _buffer(slow, longest)
    lambda_start = _buffer(slow, longest)
    sums = (lambda_, mu, keep, lambda_gradient, lambda_sum, mu_gradient)
    for begin in range(start, stop, SWEEP_BLOCK):
        end = min(begin + SWEEP_BLOCK, stop)
        size = end - begin
        rates = rate[begin:end] if rate.size > 1 else same_rate
        decays = decay[begin:end] if decay.size > 1 else same_decay
        for total in (lambda_gradient, lambda_sum, mu_gradient, mu_start, lambda_start):
            total[:] = 0
        _write_complement(keep, decays)
        for row in range(rows):
            lambda_[:], mu[:] = 0, 0
            if incoming.shape[0] > 0:
                one = row if incoming.shape[0] > 1 else 0
                _copy(lambda_[:size], incoming[one, begin:end])
            at, step = (slow, rows, row, begin, end), 0
            while step < addresses.size:
                left = addresses[step:]
                if left.size >= 8:
                    gradients = (
                        _part(left[0], *at),
                        _part(left[1], *at),
                        _part(left[2], *at),
                        _part(left[3], *at),
                        _part(left[4], *at),
                        _part(left[5], *at),
                        _part(left[6], *at),
                        _part(left[7], *at),
                    )
                    _back(*sums, gradients, weights[step:])
                    step += 8
                else:
                    _back(*sums, (_part(left[0], *at),), weights[step:])
                    step += 1
            if to_first.shape[0] > 0:
                _copy(to_first[row, begin:end], lambda_)
            if truncated:
                _add(lambda_start, lambda_)
            if begun.shape[0] > 0:
                one = row if begun.shape[0] > 1 else 0
                _subtract_product(mu_start, mu, begun[one, begin:end], slow[begin:end])
        if to_slow.shape[0] > 0:
            _write_product(to_slow[0, begin:end], decays, lambda_sum, lambda_start)
        if to_rate.shape[0] > 0:
            _write_negative(to_rate[0, begin:end], lambda_gradient)
        if to_decay.shape[0] > 0:
            _write_product(to_decay[0, begin:end], rates, mu_gradient, mu_start)
