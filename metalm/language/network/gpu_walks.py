"""The walks of `row_walks.py` through a segment on a GPU: one kernel a step, or two.

Where every row has a recurrent weight of its own, a step is its product with one vector, which
reads that weight once and does nothing else worth mentioning. There each program has a block of
units of one row: it does the product for its block, and the elementwise work of these units with
the numbers still in registers. Where the rows share the weight a step is torch's product and one
kernel for all that is elementwise. Written in Triton, which comes with torch's builds for CUDA.

Shapes: `time`, `rows`, `hidden`; the recurrent weight is [4 hidden, hidden], or has rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Blocks of a program: units whose gates it works out, and terms of the sums it takes at a time.
_UNITS, _TERMS = 8, 128
# Going back: units whose sums it takes, from many programs to few, and gates at a time.
_BACK_UNITS, _GATES = (32, 64, 128), 16
# Programs that fill a GPU.
_PROGRAMS = 512
# Units of a program that has no product to take.
_BLOCK = 256

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def fits(steps: Tensor, weight: Tensor) -> bool:
    """Whether these walks take a segment: on a GPU, in float32 or float64."""
    own = weight.dim() == 2 or weight.dtype == steps.dtype
    return steps.is_cuda and len(steps) > 0 and steps.dtype in _TYPES and own


def read(
    gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads a segment.

    Args:
        gates: W x_t + b, [time, rows, 4 hidden], overwritten by i, f, g, o.
        hidden: h before the first step, [rows, hidden].
        cell: c likewise.
        weight: U; where rows share it, in the type of the products.

    Returns:
        the gates; h and c from before the first step on, [time + 1, rows, hidden].
    """
    time, rows, _ = gates.shape
    size, kind = hidden.shape[-1], _TYPES[gates.dtype]
    gates, weight = gates.contiguous(), weight.detach().contiguous()
    hiddens = gates.new_empty(time + 1, rows, size)
    cells = torch.empty_like(hiddens)
    hiddens[0], cells[0] = hidden, cell
    for step in range(time):
        ends = cells[step], hiddens[step + 1], cells[step + 1]
        if weight.dim() == 2:
            product = hiddens[step].to(weight.dtype) @ weight.t()
            _read_shared[triton.cdiv(size, _BLOCK), rows](
                gates[step], product, *ends, SIZE=size, TYPE=kind, BLOCK=_BLOCK
            )
        else:
            _read_own[triton.cdiv(size, _UNITS), rows](
                gates[step],
                weight,
                hiddens[step],
                *ends,
                SIZE=size,
                TYPE=kind,
                UNITS=_UNITS,
                TERMS=_TERMS,
            )
    return gates, hiddens, cells


def walk_back(
    to_hiddens: Tensor,
    hidden: Tensor,
    cell: Tensor,
    slope_gates: Tensor,
    slope_cell: Tensor,
    forget: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks from the last step to the first.

    Args:
        to_hiddens: what comes to h of each step, [time, rows, hidden].
        hidden: what comes to the last h, [rows, hidden].
        cell: what comes to the last c.
        slope_gates: see `row_walks.Slopes`, [time, rows, 4, hidden].
        slope_cell: see there, [time, rows, hidden].
        forget: f, likewise.
        weight: U.

    Returns:
        da [time, rows, 4, hidden]; dh and dc before the first step.
    """
    time, rows, size = forget.shape
    kind = _TYPES[slope_gates.dtype]
    to_hiddens, slope_gates, slope_cell, forget, weight, dh, dc = (
        tensor.detach().contiguous()
        for tensor in (to_hiddens, slope_gates, slope_cell, forget, weight, hidden, cell)
    )
    gates = torch.empty_like(slope_gates)
    units = _back_units(rows, size)
    for step in range(time - 1, -1, -1):
        given = to_hiddens[step], dh, dc, slope_gates[step], slope_cell[step], forget[step]
        before_c = torch.empty_like(dc)
        if weight.dim() == 2:
            _back_shared[triton.cdiv(size, _BLOCK), rows](
                *given, gates[step], before_c, SIZE=size, BLOCK=_BLOCK
            )
            dh = (gates[step].flatten(1).to(weight.dtype) @ weight).to(dh.dtype)
        else:
            before_h = torch.empty_like(dh)
            _back_own[triton.cdiv(size, units), rows](
                *given,
                weight,
                gates[step],
                before_c,
                before_h,
                SIZE=size,
                TYPE=kind,
                UNITS=units,
                GATES=_GATES,
            )
            dh = before_h
        dc = before_c
    return gates, dh, dc


def _back_units(rows: int, size: int) -> int:
    """The most units a program that still leave a GPU enough programs, or the fewest."""
    enough = [units for units in _BACK_UNITS if rows * triton.cdiv(size, units) >= _PROGRAMS]
    return max(enough, default=_BACK_UNITS[0])


# ---- compiled ----


@triton.jit
def _read_shared(
    gates,
    product,
    cell,
    hidden_after,
    cell_after,
    SIZE: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_unit = unit < SIZE
    from_h = product + row * (4 * SIZE) + unit
    on_i = tl.load(from_h, mask=is_unit).to(TYPE)
    on_f = tl.load(from_h + SIZE, mask=is_unit).to(TYPE)
    on_g = tl.load(from_h + 2 * SIZE, mask=is_unit).to(TYPE)
    on_o = tl.load(from_h + 3 * SIZE, mask=is_unit).to(TYPE)
    _cell(gates, on_i, on_f, on_g, on_o, cell, hidden_after, cell_after, row, unit, is_unit, SIZE)


@triton.jit
def _cell(
    gates,
    on_i,
    on_f,
    on_g,
    on_o,
    cell,
    hidden_after,
    cell_after,
    row,
    unit,
    is_unit,
    SIZE: tl.constexpr,
):
    own = gates + row * (4 * SIZE) + unit
    i = _sigmoid(tl.load(own, mask=is_unit) + on_i)
    f = _sigmoid(tl.load(own + SIZE, mask=is_unit) + on_f)
    g = _tanh(tl.load(own + 2 * SIZE, mask=is_unit) + on_g)
    o = _sigmoid(tl.load(own + 3 * SIZE, mask=is_unit) + on_o)
    tl.store(own, i, mask=is_unit)
    tl.store(own + SIZE, f, mask=is_unit)
    tl.store(own + 2 * SIZE, g, mask=is_unit)
    tl.store(own + 3 * SIZE, o, mask=is_unit)
    c = f * tl.load(cell + row * SIZE + unit, mask=is_unit) + i * g
    tl.store(cell_after + row * SIZE + unit, c, mask=is_unit)
    tl.store(hidden_after + row * SIZE + unit, o * _tanh(c), mask=is_unit)


@triton.jit
def _back_shared(
    to_hidden,
    dh,
    dc,
    slope_gates,
    slope_cell,
    forget,
    gates,
    before_c,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_unit = unit < SIZE
    at = row * SIZE + unit
    h = tl.load(dh + at, mask=is_unit) + tl.load(to_hidden + at, mask=is_unit)
    c = tl.load(dc + at, mask=is_unit) + h * tl.load(slope_cell + at, mask=is_unit)
    tl.store(before_c + at, c * tl.load(forget + at, mask=is_unit), mask=is_unit)
    for kind in tl.static_range(4):
        there = row * (4 * SIZE) + kind * SIZE + unit
        comes = h if kind == 3 else c
        tl.store(gates + there, comes * tl.load(slope_gates + there, mask=is_unit), mask=is_unit)


@triton.jit
def _read_own(
    gates,
    weight,
    hidden,
    cell,
    hidden_after,
    cell_after,
    SIZE: tl.constexpr,
    TYPE: tl.constexpr,
    UNITS: tl.constexpr,
    TERMS: tl.constexpr,
):
    row = tl.program_id(1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = unit < SIZE
    lines = weight + tl.cast(row, tl.int64) * (4 * SIZE * SIZE) + unit[:, None] * SIZE
    on_i = tl.zeros((UNITS, TERMS), TYPE)
    on_f = tl.zeros((UNITS, TERMS), TYPE)
    on_g = tl.zeros((UNITS, TERMS), TYPE)
    on_o = tl.zeros((UNITS, TERMS), TYPE)
    for begin in range(0, SIZE, TERMS):
        term = begin + tl.arange(0, TERMS)
        inside = is_unit[:, None] & (term < SIZE)[None, :]
        h = tl.load(hidden + row * SIZE + term, mask=term < SIZE, other=0.0)[None, :]
        at = lines + term[None, :]
        on_i += tl.load(at, mask=inside, other=0.0) * h
        on_f += tl.load(at + SIZE * SIZE, mask=inside, other=0.0) * h
        on_g += tl.load(at + 2 * SIZE * SIZE, mask=inside, other=0.0) * h
        on_o += tl.load(at + 3 * SIZE * SIZE, mask=inside, other=0.0) * h
    on_i, on_f = tl.sum(on_i, 1), tl.sum(on_f, 1)
    on_g, on_o = tl.sum(on_g, 1), tl.sum(on_o, 1)
    _cell(gates, on_i, on_f, on_g, on_o, cell, hidden_after, cell_after, row, unit, is_unit, SIZE)


@triton.jit
def _back_own(
    to_hidden,
    dh,
    dc,
    slope_gates,
    slope_cell,
    forget,
    weight,
    gates,
    before_c,
    before_h,
    SIZE: tl.constexpr,
    TYPE: tl.constexpr,
    UNITS: tl.constexpr,
    GATES: tl.constexpr,
):
    row = tl.program_id(1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = unit < SIZE
    written = tl.where(tl.program_id(0) == 0, SIZE, 0)  # the first one writes for all
    columns = weight + tl.cast(row, tl.int64) * (4 * SIZE * SIZE) + unit[None, :]
    total = tl.zeros((GATES, UNITS), TYPE)
    for begin in range(0, SIZE, GATES):
        gate = begin + tl.arange(0, GATES)
        is_gate = gate < SIZE
        inside = is_gate[:, None] & is_unit[None, :]
        at = row * SIZE + gate
        h = tl.load(dh + at, mask=is_gate, other=0.0)
        h += tl.load(to_hidden + at, mask=is_gate, other=0.0)
        c = tl.load(dc + at, mask=is_gate, other=0.0)
        c += h * tl.load(slope_cell + at, mask=is_gate, other=0.0)
        later = c * tl.load(forget + at, mask=is_gate, other=0.0)
        tl.store(before_c + at, later, mask=gate < written)
        for kind in tl.static_range(4):
            there = row * (4 * SIZE) + kind * SIZE + gate
            comes = h if kind == 3 else c
            now = comes * tl.load(slope_gates + there, mask=is_gate, other=0.0)
            tl.store(gates + there, now, mask=gate < written)
            tile = columns + (kind * SIZE + gate)[:, None] * SIZE
            total += tl.load(tile, mask=inside, other=0.0) * now[:, None]
    tl.store(before_h + row * SIZE + unit, tl.sum(total, 0), mask=is_unit)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # Without infinity; off by a rounding of 1 at most.
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)
