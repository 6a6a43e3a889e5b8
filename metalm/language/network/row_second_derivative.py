"""The second derivative of the recurrence with weights per row.

The gradient of a segment is linear in what comes to it from outside. So the derivative of its
product with a direction (x', h'_0, c'_0, W', U', b') is one walk forward, which carries what the
direction changes (a', c', h'), and one walk back of the same form as the first, with further terms.

Shapes: `time`, `rows`, `inputs`, `hidden`; gates are ordered i, f, g, o as in `torch.nn.LSTM`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metalm.language.network import compiled_walks
from metalm.language.network.products import product
from metalm.language.network.row_walks import (
    Further,
    Reading,
    Slopes,
    Walk,
    Walked,
    bias_gradient,
    over_time,
    row_groups,
    rows_first,
    slopes_of,
    split_gates,
    times,
)


class Direction(NamedTuple):
    """x', h'_0, c'_0, W', U', b': the gradients that come to the first gradient; None for zeros."""

    inputs: Tensor | None
    hidden: Tensor | None
    cell: Tensor | None
    input_weight: Tensor | None
    hidden_weight: Tensor | None
    bias: Tensor | None


def second_derivative(
    reading: Reading, first: Walked, along: Direction, dtype: torch.dtype, bias_per_row: bool
) -> tuple[Tensor, ...]:
    """Gradient of the product of the first gradient with a direction.

    Args:
        reading: the segment.
        first: the first walk back, with its records.
        along: the direction.
        dtype: type of the products.
        bias_per_row: whether each row has a bias of its own.

    Returns:
        What goes to the gradients that came to the outputs, the last h and the last c; and to
        inputs, h, c, W, U and b.
    """
    slopes, gates = slopes_of(reading), rows_first(first.gates)
    tangent = _tangent(reading, slopes, along, dtype)
    to_before = None
    if along.hidden_weight is not None:
        to_before = product(gates, along.hidden_weight.to(dtype)).transpose(0, 1)
    walked = _second_walk(reading, first, tangent, to_before).back(reading, slopes, False)
    by_row = rows_first(walked.gates)
    own, recurrent = reading.input_weight, reading.hidden_weight
    to_inputs = product(by_row, own)
    to_own = over_time(by_row, rows_first(reading.inputs), own, dtype)
    if along.input_weight is not None:
        to_inputs += product(gates, along.input_weight.to(dtype))
    if along.inputs is not None:
        to_own += over_time(gates, rows_first(along.inputs), own, dtype)
    to_recurrent = over_time(by_row, reading.before, recurrent, dtype)
    to_recurrent += over_time(gates, rows_first(tangent.hiddens[:-1]), recurrent, dtype)
    assert walked.hidden is not None
    assert walked.cell is not None
    return (
        tangent.hiddens[1:],
        tangent.hiddens[-1],
        tangent.cells[-1],
        to_inputs.transpose(0, 1),
        walked.hidden,
        walked.cell,
        to_own,
        to_recurrent,
        bias_gradient(by_row, bias_per_row),
    )


class _Tangent(NamedTuple):
    """a', [time, rows, 4, hidden]; h' and c', [time + 1, rows, hidden]."""

    gates: Tensor
    hiddens: Tensor
    cells: Tensor


def _tangent(reading: Reading, slopes: Slopes, along: Direction, dtype: torch.dtype) -> _Tangent:
    """What the direction changes, from the first step to the last."""
    time, rows, four = reading.gates.shape
    by_row = reading.gates.new_zeros(rows, time, four)
    if along.inputs is not None:
        by_row += product(rows_first(along.inputs), reading.input_weight.transpose(-1, -2))
    if along.input_weight is not None:
        change = along.input_weight.to(dtype)
        by_row += product(rows_first(reading.inputs), change.transpose(-1, -2))
    if along.hidden_weight is not None:
        change = along.hidden_weight.to(dtype)
        by_row += product(reading.before, change.transpose(-1, -2))
    if along.bias is not None:
        by_row += along.bias.unsqueeze(-2)
    gates = by_row.transpose(0, 1).contiguous()
    hiddens, cells = torch.zeros_like(reading.hiddens), torch.zeros_like(reading.cells)
    if along.hidden is not None:
        hiddens[0] = along.hidden
    if along.cell is not None:
        cells[0] = along.cell
    if compiled_walks.wanted(gates):
        gates, hiddens[1:], cells[1:] = compiled_walks.changes(
            gates, hiddens[0], cells[0], slopes, reading.hidden_weight
        )
        return _Tangent(gates.unflatten(2, (4, -1)), hiddens, cells)
    for group, weight in row_groups(reading.hidden_weight, rows):
        for step in range(time):
            now = gates[step, group]
            now += times(hiddens[step, group], weight.transpose(-1, -2))
            moved = slopes.gates[step, group] * now.unflatten(1, (4, -1))
            after = cells[step + 1, group]
            torch.mul(slopes.forget[step, group], cells[step, group], out=after)
            after += moved[:, :3].sum(1)
            torch.addcmul(
                moved[:, 3], slopes.cell[step, group], after, out=hiddens[step + 1, group]
            )
    return _Tangent(gates.unflatten(2, (4, -1)), hiddens, cells)


def _second_walk(
    reading: Reading, first: Walked, tangent: _Tangent, to_before: Tensor | None
) -> Walk:
    """The walk back of S, the sum over steps of h' dh + c' dc, with dh and dc of the first walk.

    Args:
        reading: the segment.
        first: the first walk back.
        tangent: what the direction changes.
        to_before: U'^T da of each step, [time, rows, hidden]; None for zeros.
    """
    assert first.hiddens is not None
    assert first.cells is not None
    dh, dc = first.hiddens, first.cells
    i, f, g, o = split_gates(reading.gates)
    on_i, on_f, on_g, on_o = tangent.gates.unbind(2)
    cell, last_cell = tangent.cells[1:], tangent.cells[:-1]
    k, before = reading.cells[1:].tanh(), reading.cells[:-1]
    q = 1 - k * k
    own_i, own_f, own_g, own_o = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)
    to_gates = (
        own_i * dc * (own_g * on_g + g * (1 - 2 * i) * on_i),
        own_f * dc * (last_cell + before * (1 - 2 * f) * on_f),
        own_g * dc * (own_i * on_i - 2 * i * g * on_g),
        own_o * dh * (q * cell + k * (1 - 2 * o) * on_o),
    )
    to_cells = q * dh * (own_o * on_o - 2 * k * o * cell)
    nothing = torch.zeros_like(dh)
    return Walk(
        nothing,
        nothing[-1],
        nothing[-1],
        Further(
            torch.stack(to_gates, dim=2),
            to_cells,
            nothing if to_before is None else to_before,
            own_f * on_f * dc,
        ),
    )
