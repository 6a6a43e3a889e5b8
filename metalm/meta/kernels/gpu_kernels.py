"""The loops of the step W <- W - s g + rho (W_0 - W) on a GPU, each in one pass over memory.

As `cpu_kernels.py`: each number of W and of every g_t is read once. A program of the sweep has a
block of coordinates, whose lambda, mu and sums over rows stay in registers while it goes through
the rows and, in each, back through all steps; one of the traced step has the sums over rows of its
block. Written in Triton, which comes with torch's builds for CUDA. `tensor_kernels.py` has the same
functions in tensor operations, for any device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metalm.meta.kernels.step_gradients import StepGradients, Steps, TraceSums, Wanted

__all__ = ["fits", "sweep", "write_step", "write_traced_step"]

# Coordinates of a program: guesses, no GPU has searched them.
_STEP_BLOCK = 1024
_SWEEP_BLOCK = 512
# Rows of a program of the step, which reads W_0, s and rho once for all of them.
_STEP_ROWS = 8

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def fits(tensor: Tensor) -> bool:
    """Whether these kernels take a tensor: on a GPU, float32 or 64, contiguous, not empty."""
    known = tensor.is_cuda and tensor.dtype in _TYPES
    return known and tensor.is_contiguous() and tensor.numel() > 0


def write_step(
    new: Tensor, weight: Tensor, gradient: Tensor, slow: Tensor, rate: Tensor, decay: Tensor | None
) -> None:
    """See `tensor_kernels.write_step`; `fits` holds for ``new``."""
    count = slow.numel()
    rows = new.numel() // count
    weight, gradient = _rows(weight, slow), _rows(gradient, slow)
    slow, rate, decay = slow.contiguous(), _coefficient(rate, slow), _coefficient(decay, slow)
    _write_step[triton.cdiv(count, _STEP_BLOCK), triton.cdiv(rows, _STEP_ROWS)](
        new,
        weight,
        gradient,
        slow,
        rate,
        decay,
        count,
        rows,
        _stride(weight, count),
        _stride(gradient, count),
        ONE_RATE=rate.numel() == 1,
        ONE_DECAY=decay.numel() == 1,
        ROWS=_STEP_ROWS,
        BLOCK=_STEP_BLOCK,
    )


def sweep(steps: Steps, incoming: Tensor | None, wanted: Wanted) -> StepGradients:
    """Go back through the steps; see `tensor_kernels.sweep`. `fits` holds for W_0."""
    slow, count = steps.slow, steps.slow.numel()
    gradients = [gradient.contiguous() for gradient in steps.gradients]  # these are pointed to
    rows = gradients[0].numel() // count
    found = StepGradients(
        torch.empty_like(gradients[0]) if wanted.first else None,
        *(torch.empty_like(slow) if want else None for want in wanted[1:]),
    )
    rate, decay = _coefficient(steps.rate, slow), _coefficient(steps.decay, slow)
    start = slow if steps.start is None else _rows(steps.start, slow)
    ended = slow if incoming is None else _rows(incoming, slow)
    addresses = [gradient.data_ptr() for gradient in reversed(gradients)]
    _sweep[(triton.cdiv(count, _SWEEP_BLOCK),)](
        torch.tensor(addresses, device=slow.device),
        torch.tensor(steps.weights[::-1], dtype=slow.dtype, device=slow.device),
        len(addresses),
        slow.contiguous(),
        rate,
        decay,
        start,
        ended,
        *(slow if tensor is None else tensor for tensor in found),
        count,
        rows,
        _stride(start, count),
        _stride(ended, count),
        HAS_START=steps.start is not None,
        HAS_END=incoming is not None,
        TRUNCATED=steps.truncated,
        ONE_RATE=rate.numel() == 1,
        ONE_DECAY=decay.numel() == 1,
        TO_FIRST=wanted.first,
        TO_SLOW=wanted.slow,
        TO_RATE=wanted.rate,
        TO_DECAY=wanted.decay,
        TYPE=_TYPES[slow.dtype],
        BLOCK=_SWEEP_BLOCK,
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
    """See `tensor_kernels.write_traced_step`; `fits` holds for ``weight`` and ``trace``."""
    count = slow.numel()
    rows = weight.numel() // count
    gradient, slow = _rows(gradient, slow), slow.detach().contiguous()
    rate, decay = _coefficient(rate, slow), _coefficient(decay, slow)
    _write_traced_step[(triton.cdiv(count, _SWEEP_BLOCK),)](
        weight,
        gradient,
        slow,
        rate,
        decay,
        slow if trace is None else trace,
        *(slow if total is None else total for total in sums),
        slow.new_full((1,), share),
        count,
        rows,
        _stride(gradient, count),
        ONE_RATE=rate.numel() == 1,
        ONE_DECAY=decay.numel() == 1,
        TRACED=trace is not None,
        TO_RATE=sums.rate is not None,
        TO_DECAY=sums.decay is not None and trace is not None,
        TO_SLOW=sums.slow is not None,
        TYPE=_TYPES[slow.dtype],
        BLOCK=_SWEEP_BLOCK,
    )


# ---- tensors as memory ----


def _rows(tensor: Tensor, slow: Tensor) -> Tensor:
    """``[rows, coordinates]``, of which there is one for the same row many times."""
    if tensor.dim() > slow.dim() and tensor.stride(0) == 0:
        tensor = tensor[:1]
    return tensor.detach().contiguous().view(-1, slow.numel())


def _stride(tensor: Tensor, count: int) -> int:
    return count if tensor.numel() > count else 0


def _coefficient(number: Tensor | None, slow: Tensor) -> Tensor:
    """One number, or one for each coordinate; None is 0."""
    if number is None:
        return slow.new_zeros(1)
    number = number.detach()
    return number if number.numel() == 1 else number.expand_as(slow).contiguous()


# ---- compiled ----


@triton.jit(do_not_specialize=["rows"])
def _write_step(
    new,
    weight,
    gradient,
    slow,
    rate,
    decay,
    count,
    rows,
    weight_stride,
    gradient_stride,
    ONE_RATE: tl.constexpr,
    ONE_DECAY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    home = tl.load(slow + place, mask=inside)
    s = tl.load(rate) if ONE_RATE else tl.load(rate + place, mask=inside)
    rho = tl.load(decay) if ONE_DECAY else tl.load(decay + place, mask=inside)
    for more in range(ROWS):
        row = tl.program_id(1) * ROWS + more
        if row < rows:
            far = tl.cast(row, tl.int64)
            w = tl.load(weight + far * weight_stride + place, mask=inside)
            g = tl.load(gradient + far * gradient_stride + place, mask=inside)
            tl.store(new + far * count + place, w - s * g + rho * (home - w), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _sweep(
    addresses,
    weights,
    steps,
    slow,
    rate,
    decay,
    start,
    ended,
    to_first,
    to_slow,
    to_rate,
    to_decay,
    count,
    rows,
    start_stride,
    ended_stride,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    TRUNCATED: tl.constexpr,
    ONE_RATE: tl.constexpr,
    ONE_DECAY: tl.constexpr,
    TO_FIRST: tl.constexpr,
    TO_SLOW: tl.constexpr,
    TO_RATE: tl.constexpr,
    TO_DECAY: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    s = tl.load(rate) if ONE_RATE else tl.load(rate + place, mask=inside)
    rho = tl.load(decay) if ONE_DECAY else tl.load(decay + place, mask=inside)
    keep = 1 - rho
    home = tl.load(slow + place, mask=inside)
    lambda_gradient = tl.zeros((BLOCK,), TYPE)
    lambda_sum = tl.zeros((BLOCK,), TYPE)
    mu_gradient = tl.zeros((BLOCK,), TYPE)
    mu_start = tl.zeros((BLOCK,), TYPE)
    lambda_start = tl.zeros((BLOCK,), TYPE)
    for row in range(rows):
        far = tl.cast(row, tl.int64)
        lambda_ = tl.zeros((BLOCK,), TYPE)
        mu = tl.zeros((BLOCK,), TYPE)
        if HAS_END:
            lambda_ = tl.load(ended + far * ended_stride + place, mask=inside)
        for step in range(steps):
            memory = tl.load(addresses + step).to(tl.pointer_type(TYPE))
            g = tl.load(memory + far * count + place, mask=inside)
            lambda_gradient += lambda_ * g
            lambda_sum += lambda_
            mu_gradient += mu * g
            mu = lambda_ + keep * mu
            lambda_ = tl.load(weights + step) * g + keep * lambda_
        if TO_FIRST:
            tl.store(to_first + far * count + place, lambda_, mask=inside)
        if TRUNCATED:
            lambda_start += lambda_
        if HAS_START:
            w = tl.load(start + far * start_stride + place, mask=inside)
            mu_start -= mu * (w - home)
    if TO_SLOW:
        tl.store(to_slow + place, rho * lambda_sum + lambda_start, mask=inside)
    if TO_RATE:
        tl.store(to_rate + place, -lambda_gradient, mask=inside)
    if TO_DECAY:
        tl.store(to_decay + place, s * mu_gradient + mu_start, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _write_traced_step(
    weight,
    gradient,
    slow,
    rate,
    decay,
    trace,
    to_rate,
    to_decay,
    to_slow,
    share,
    count,
    rows,
    gradient_stride,
    ONE_RATE: tl.constexpr,
    ONE_DECAY: tl.constexpr,
    TRACED: tl.constexpr,
    TO_RATE: tl.constexpr,
    TO_DECAY: tl.constexpr,
    TO_SLOW: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    s = tl.load(rate) if ONE_RATE else tl.load(rate + place, mask=inside)
    rho = tl.load(decay) if ONE_DECAY else tl.load(decay + place, mask=inside)
    home = tl.load(slow + place, mask=inside)
    counted = tl.load(share)
    by_rate = tl.zeros((BLOCK,), TYPE)
    by_decay = tl.zeros((BLOCK,), TYPE)
    by_slow = tl.zeros((BLOCK,), TYPE)
    for row in range(rows):
        far = tl.cast(row, tl.int64)
        w = tl.load(weight + far * count + place, mask=inside)
        g = tl.load(gradient + far * gradient_stride + place, mask=inside)
        away = w - home
        by_rate += g * away
        by_slow += g
        if TRACED:
            later = tl.load(trace + far * count + place, mask=inside)
            by_decay += g * later
            tl.store(trace + far * count + place, later - rho * later - away, mask=inside)
        tl.store(weight + far * count + place, w - s * g - rho * away, mask=inside)
    if TO_RATE:
        before = tl.load(to_rate + place, mask=inside)
        tl.store(to_rate + place, before + counted * by_rate, mask=inside)
    if TO_DECAY:
        before = tl.load(to_decay + place, mask=inside)
        tl.store(to_decay + place, before + counted * by_decay, mask=inside)
    if TO_SLOW:
        before = tl.load(to_slow + place, mask=inside)
        tl.store(to_slow + place, before + counted * by_slow, mask=inside)
