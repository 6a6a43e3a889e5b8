"""Walks through a segment of the recurrence with weights per row: reading, and its gradient back.

With a_t the gates before their nonlinearity, k = tanh(c), q = 1 - k^2:

    a_t = W x_t + U h_{t-1} + b        c_t = f c_{t-1} + i g        h_t = o k
    dc_t = o q dh_t + f_{t+1} dc_{t+1}        dh_{t-1} = U^T da_t (and what comes from outside)
    da_t = (slope_i dc_t, slope_f dc_t, slope_g dc_t, slope_o dh_t)

where slope_i = g i(1 - i), slope_f = c_{t-1} f(1 - f), slope_g = i(1 - g^2), slope_o = k o(1 - o).

Shapes: `time`, `rows`, `inputs`, `hidden`; gates are ordered i, f, g, o as in `torch.nn.LSTM`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from metalm.language.network import compiled_walks
from metalm.language.network.products import product
from metalm.meta.kernels.gpu_support import kernels_in


class Reading(NamedTuple):
    """What reading a segment leaves for its derivatives."""

    inputs: Tensor
    """[time, rows, inputs]."""
    input_weight: Tensor
    """[4 hidden, inputs], or with rows; in the type of the products."""
    hidden_weight: Tensor
    """[4 hidden, hidden] in the type of the products, or with rows in its own."""
    gates: Tensor
    """i, f, g, o, [time, rows, 4 hidden]."""
    hiddens: Tensor
    """h from before the first step on, [time + 1, rows, hidden]."""
    cells: Tensor
    """c likewise."""

    @property
    def before(self) -> Tensor:
        """The h before each step, [rows, time, hidden]."""
        return rows_first(self.hiddens[:-1])


def read(
    dtype: torch.dtype,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    bias: Tensor,
) -> Reading:
    """Reads a segment; see `RowLSTM` for what it takes."""
    time, rows, _ = inputs.shape
    input_weight = input_weight.to(dtype)
    if hidden_weight.dim() == 2:
        hidden_weight = hidden_weight.to(dtype)
    gates = product(rows_first(inputs), input_weight.transpose(-1, -2))
    # [4 hidden] -> [1, 4 hidden]; [rows, 4 hidden] -> [rows, 1, 4 hidden]
    gates += bias.unsqueeze(-2)
    gates = gates.transpose(0, 1).contiguous()  # [time, rows, 4 hidden]
    if (own_kernels := gpu_walks_for(gates, hidden_weight)) is not None:
        found = own_kernels.read(gates, hidden, cell, hidden_weight)
        return Reading(inputs, input_weight, hidden_weight, *found)
    if compiled_walks.wanted(gates):
        gates, *after = compiled_walks.read(gates, hidden, cell, hidden_weight)
        hiddens, cells = (
            torch.cat((first.unsqueeze(0), rest))
            for first, rest in zip((hidden, cell), after, strict=True)
        )
        return Reading(inputs, input_weight, hidden_weight, gates, hiddens, cells)
    hiddens = gates.new_empty(time + 1, rows, hidden.shape[-1])
    cells = torch.empty_like(hiddens)
    hiddens[0], cells[0] = hidden, cell
    for group, weight in row_groups(hidden_weight, rows):
        for step in range(time):
            _forward_step(step, group, gates, hiddens, cells, weight)
    return Reading(inputs, input_weight, hidden_weight, gates, hiddens, cells)


def _forward_step(
    step: int, group: slice, gates: Tensor, hiddens: Tensor, cells: Tensor, weight: Tensor
) -> None:
    """One time step for one group of rows; fills `gates`, `hiddens` and `cells` in place."""
    size = hiddens.shape[-1]
    now = gates[step, group]
    now += times(hiddens[step, group], weight.transpose(-1, -2))
    now[:, : 2 * size].sigmoid_()
    now[:, 2 * size : 3 * size].tanh_()
    now[:, 3 * size :].sigmoid_()
    i, f, g, o = now.split(size, dim=-1)
    after = torch.mul(f, cells[step, group], out=cells[step + 1, group])
    after.addcmul_(i, g)
    torch.mul(o, after.tanh(), out=hiddens[step + 1, group])


class Slopes(NamedTuple):
    """What the walk back multiplies with, none of it recurrent."""

    gates: Tensor
    """slope_i, slope_f, slope_g of dc and slope_o of dh, [time, rows, 4, hidden]."""
    cell: Tensor
    """o q, [time, rows, hidden]."""
    forget: Tensor
    """f, [time, rows, hidden]."""


def slopes_of(reading: Reading) -> Slopes:
    """What the walks back through a segment multiply with."""
    i, f, g, o = split_gates(reading.gates)
    cells = reading.cells
    tanh_cell = cells[1:].tanh()
    gates = torch.stack(
        (g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g), tanh_cell * o * (1 - o)),
        dim=2,
    )
    return Slopes(gates, o * (1 - tanh_cell * tanh_cell), f)


class Walked(NamedTuple):
    """What a walk back leaves."""

    gates: Tensor
    """da, [time, rows, 4 hidden]."""
    hiddens: Tensor | None
    """dh of each step, [time, rows, hidden], where it was asked for."""
    cells: Tensor | None
    """dc of each step, likewise."""
    hidden: Tensor | None
    """dh before the first step, [rows, hidden]."""
    cell: Tensor | None
    """dc before the first step."""


class Further(NamedTuple):
    """What comes to the walk back of the second derivative from the first one."""

    gates: Tensor
    """To a of each step, [time, rows, 4, hidden]."""
    cells: Tensor
    """To c of each step, [time, rows, hidden]."""
    hiddens_before: Tensor
    """To h before each step, [time, rows, hidden]."""
    cells_before: Tensor
    """To c before each step, likewise."""


class Walk(NamedTuple):
    """A walk back through time, with what comes to it from outside."""

    to_hiddens: Tensor
    """To h of each step, [time, rows, hidden]."""
    hidden: Tensor
    """To the last h, [rows, hidden]."""
    cell: Tensor
    """To the last c."""
    further: Further | None = None
    """What the second derivative adds."""

    def back(self, reading: Reading, slopes: Slopes, record: bool) -> Walked:
        """From the last step to the first."""
        own_kernels = gpu_walks_for(slopes.cell, reading.hidden_weight)
        if own_kernels is not None and self.further is None and not record:
            gates, *before = own_kernels.walk_back(
                self.to_hiddens, self.hidden, self.cell, *slopes, reading.hidden_weight
            )
            return Walked(gates.flatten(2), None, None, *before)
        if compiled_walks.wanted(slopes.cell):
            (gates, *each), *before = compiled_walks.walk_back(
                self.to_hiddens,
                self.hidden,
                self.cell,
                slopes,
                reading.hidden_weight,
                self.further,
            )
            return Walked(gates.flatten(2), *each, *before)
        time, rows, _, _ = slopes.gates.shape
        gates = torch.empty_like(slopes.gates)
        grad_h, grad_c = self.hidden.clone(), self.cell.clone()
        hiddens = torch.empty_like(slopes.cell) if record else None
        cells = torch.empty_like(slopes.cell) if record else None
        for group, weight in row_groups(reading.hidden_weight, rows):
            dh, dc = grad_h[group], grad_c[group]
            for step in range(time - 1, -1, -1):
                dh = dh + self.to_hiddens[step, group]
                dc = torch.addcmul(dc, dh, slopes.cell[step, group])
                if self.further is not None:
                    dc = dc + self.further.cells[step, group]
                if hiddens is not None and cells is not None:
                    hiddens[step, group], cells[step, group] = dh, dc
                now = gates[step, group]
                torch.mul(slopes.gates[step, group, :3], dc.unsqueeze(1), out=now[:, :3])
                torch.mul(slopes.gates[step, group, 3], dh, out=now[:, 3])
                if self.further is not None:
                    now += self.further.gates[step, group]
                dc = dc * slopes.forget[step, group]
                dh = times(now.flatten(1), weight)
                if self.further is not None:
                    dh = dh + self.further.hiddens_before[step, group]
                    dc = dc + self.further.cells_before[step, group]
            grad_h[group], grad_c[group] = dh, dc
        return Walked(gates.flatten(2), hiddens, cells, grad_h, grad_c)


def gpu_walks_for(steps: Tensor, hidden_weight: Tensor) -> ModuleType | None:
    """The walks in Triton, where they take these steps with this recurrent weight."""
    gpu_walks = kernels_in("metalm.language.network.gpu_walks") if steps.is_cuda else None
    fits = gpu_walks is not None and gpu_walks.fits(steps, hidden_weight)
    return gpu_walks if fits else None


def split_gates(gates: Tensor) -> tuple[Tensor, ...]:
    """The gates i, f, g and o, each [..., hidden]."""
    return gates.chunk(4, dim=-1)


def rows_first(tensor: Tensor) -> Tensor:
    """[time, rows, ...] to [rows, time, ...] in memory."""
    return tensor.transpose(0, 1).contiguous()


def row_groups(hidden_weight: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """How rows share the loop over time, and the recurrent weight of each group.

    A shared recurrent weight is one product for all rows. Recurrent weights of their own are read
    again at every step: on a CPU one row after the other keeps its weight in cache, elsewhere all
    rows go in one batched product.
    """
    if hidden_weight.dim() == 2 or hidden_weight.device.type != "cpu":
        yield slice(0, rows), hidden_weight
        return
    for row in range(rows):
        yield slice(row, row + 1), hidden_weight[row : row + 1]


def times(values: Tensor, weight: Tensor) -> Tensor:
    """[rows, out] times weight, shared [out, in] or per row [rows, out, in]; gives [rows, in]."""
    if weight.dim() == 2:
        return product(values, weight)
    if weight.shape[0] == 1:
        return values @ weight[0]
    return torch.bmm(values.unsqueeze(1), weight).squeeze(1)


def over_time(gate_gradients: Tensor, values: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of a weight from [rows, time, out] and [rows, time, in]: one product over time."""
    if weight.dim() == 3:
        return product(gate_gradients.transpose(1, 2), values.to(dtype))
    return product(gate_gradients.flatten(0, 1).t(), values.flatten(0, 1).to(dtype))


def bias_gradient(gate_gradients: Tensor, per_row: bool) -> Tensor:
    """Sum over time, and over rows where they share the bias."""
    return gate_gradients.sum(1) if per_row else gate_gradients.sum((0, 1))
