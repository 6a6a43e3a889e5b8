"""The walks of `row_walks.py` for devices on which each small operation is a kernel of its own.

There a step of those loops is about nine kernels, most of which take longer to launch than to run.
Here some steps at a time are compiled, which should leave two kernels of each: the product, and all
that is elementwise. A segment of any length is walked in pieces of a few lengths, so that little
has to be compiled. These are pure functions, unlike the loops, which fill their results in place;
the loops are the oracle. `gpu_walks.py` comes before them, but does not know second derivatives;
the two were not compared on a GPU yet.

Shapes: `time`, `rows`, `hidden`; the recurrent weight is [4 hidden, hidden], or has rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metalm.training.compiling import OftenCalled

PIECES = (5, 1)
"""Steps that are compiled as one."""

Columns = tuple[Tensor, ...]


def wanted(steps: Tensor) -> bool:
    """Whether these walks should be taken through such steps, [time, ...]."""
    return steps.device.type == "cuda" and len(steps) > 0


def read(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor) -> Columns:
    """Reads a segment.

    Args:
        gates: W x_t + b, [time, rows, 4 hidden].
        hidden: h before the first step, [rows, hidden].
        cell: c likewise.
        weight: U.

    Returns:
        i, f, g, o, [time, rows, 4 hidden]; h and c after each step, [time, rows, hidden].
    """
    hidden, cell = _values(hidden.to(gates.dtype), cell.to(gates.dtype))
    weight = weight.detach()
    found = []
    for piece in pieces(len(gates)):
        found.append(read_piece(gates[piece], hidden, cell, weight))
        hidden, cell = found[-1][1][-1], found[-1][2][-1]
    return _joined(found)


def _read_piece(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor) -> Columns:
    steps = []
    for given in gates.unbind():
        i, f, g, o = (given + _times(hidden, weight.transpose(-1, -2))).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * cell + i * g
        hidden = o * cell.tanh()
        steps.append((torch.cat((i, f, g, o), dim=-1), hidden, cell))
    return _stacked(steps)


def walk_back(
    to_hiddens: Tensor,
    hidden: Tensor,
    cell: Tensor,
    slopes: Columns,
    weight: Tensor,
    further: Columns | None,
) -> tuple[Columns, Tensor, Tensor]:
    """Walks from the last step to the first.

    Args:
        to_hiddens: what comes to h of each step, [time, rows, hidden].
        hidden: what comes to the last h, [rows, hidden].
        cell: what comes to the last c.
        slopes: the fields of `row_walks.Slopes`.
        weight: U.
        further: the fields of `row_walks.Further`.

    Returns:
        da [time, rows, 4, hidden], dh and dc [time, rows, hidden] of each step; and dh and dc
        before the first one.
    """
    to_hiddens, hidden, cell = _values(to_hiddens, hidden, cell)
    weight = weight.detach()
    found = []
    for piece in reversed(list(pieces(len(to_hiddens)))):
        more = None if further is None else tuple(part[piece] for part in further)
        now = (part[piece] for part in slopes)
        *columns, hidden, cell = back_piece(to_hiddens[piece], hidden, cell, *now, weight, more)
        found.append(tuple(columns))
    return _joined(found[::-1]), hidden, cell


def _back_piece(
    to_hiddens: Tensor,
    dh: Tensor,
    dc: Tensor,
    slope_gates: Tensor,
    slope_cell: Tensor,
    forget: Tensor,
    weight: Tensor,
    further: Columns | None,
) -> Columns:
    steps = []
    for step in reversed(range(len(to_hiddens))):
        dh = dh + to_hiddens[step]
        dc = dc + dh * slope_cell[step]
        if further is not None:
            dc = dc + further[1][step]
        now = torch.stack((dc, dc, dc, dh), dim=1) * slope_gates[step]
        if further is not None:
            now = now + further[0][step]
        steps.append((now, dh, dc))
        dh, dc = _times(now.flatten(1), weight), dc * forget[step]
        if further is not None:
            dh, dc = dh + further[2][step], dc + further[3][step]
    return *_stacked(steps[::-1]), dh, dc


def changes(
    gates: Tensor, hidden: Tensor, cell: Tensor, slopes: Columns, weight: Tensor
) -> Columns:
    """What a direction changes in a segment.

    Args:
        gates: a' of each step as far as it is not recurrent, [time, rows, 4 hidden].
        hidden: h' before the first step, [rows, hidden].
        cell: c' likewise.
        slopes: the fields of `row_walks.Slopes`.
        weight: U.

    Returns:
        a' [time, rows, 4 hidden], h' and c' [time, rows, hidden] of each step.
    """
    hidden, cell = _values(hidden, cell)
    weight = weight.detach()
    found = []
    for piece in pieces(len(gates)):
        now = (part[piece] for part in slopes)
        found.append(change_piece(gates[piece], hidden, cell, *now, weight))
        hidden, cell = found[-1][1][-1], found[-1][2][-1]
    return _joined(found)


def _change_piece(
    gates: Tensor,
    hidden: Tensor,
    cell: Tensor,
    slope_gates: Tensor,
    slope_cell: Tensor,
    forget: Tensor,
    weight: Tensor,
) -> Columns:
    steps = []
    for step, given in enumerate(gates.unbind()):
        now = given + _times(hidden, weight.transpose(-1, -2))
        on_i, on_f, on_g, on_o = (slope_gates[step] * now.unflatten(1, (4, -1))).unbind(1)
        cell = forget[step] * cell + on_i + on_f + on_g
        hidden = on_o + slope_cell[step] * cell
        steps.append((now, hidden, cell))
    return _stacked(steps)


read_piece: OftenCalled[Columns] = OftenCalled(_read_piece)
back_piece: OftenCalled[Columns] = OftenCalled(_back_piece)
change_piece: OftenCalled[Columns] = OftenCalled(_change_piece)


def pieces(time: int) -> Iterator[slice]:
    """Slices of time with lengths from `PIECES`, the longest ones first."""
    begin = 0
    for length in PIECES:
        while time - begin >= length:
            yield slice(begin, begin + length)
            begin += length


def _times(values: Tensor, weight: Tensor) -> Tensor:
    """[rows, out] times weight, shared [out, in] or per row [rows, out, in]; gives [rows, in]."""
    if weight.dim() == 2:
        return (values.to(weight.dtype) @ weight).to(values.dtype)
    return torch.bmm(values.unsqueeze(1), weight).squeeze(1)


def _values(*tensors: Tensor) -> Columns:
    """Their values alone, in order: what else is new about a tensor is compiled anew."""
    return tuple(tensor.detach().contiguous() for tensor in tensors)


def _stacked(steps: Sequence[Columns]) -> Columns:
    return tuple(torch.stack(column) for column in zip(*steps, strict=True))


def _joined(found: Sequence[Columns]) -> Columns:
    if len(found) == 1:
        return found[0]
    return tuple(torch.cat(column) for column in zip(*found, strict=True))
