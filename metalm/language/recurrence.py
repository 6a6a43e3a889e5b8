"""One LSTM layer over one segment, with weights shared by the rows or owned by each row.

A row is one article of a batch. Where every row has the same weights the fused kernel behind
`torch.nn.LSTM` is fastest. Where a weight differs per row it is a batched product, and autograd
through a loop over time would add a `rows x |W|` gradient at every step; so `_RowLSTM` has its own
backward for the whole segment: it keeps the gates, walks back through time with products of the
size of the state, and forms each weight gradient as ONE batched product over time.

Shapes: `time`, `rows`, `inputs`, `hidden`; gates are ordered i, f, g, o as in `torch.nn.LSTM`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.language.products import product, product_type, without_autocast


class LayerWeights(NamedTuple):
    """Weights of one layer; each may have a leading `rows` dimension of its own.

    Shapes: input_weight [4 hidden, inputs], hidden_weight [4 hidden, hidden], biases [4 hidden].
    """

    input_weight: Tensor
    hidden_weight: Tensor
    input_bias: Tensor
    hidden_bias: Tensor

    @property
    def are_shared(self) -> bool:
        """Whether no weight of the layer differs from row to row."""
        return (
            self.input_weight.dim() == 2
            and self.hidden_weight.dim() == 2
            and self.input_bias.dim() == 1
            and self.hidden_bias.dim() == 1
        )


class LayerState(NamedTuple):
    """Short-term memory of one layer: `hidden` and `cell`, each [rows, hidden]."""

    hidden: Tensor
    cell: Tensor


def lstm_layer(
    inputs: Tensor, state: LayerState, weights: LayerWeights
) -> tuple[Tensor, LayerState]:
    """Runs one layer over a segment.

    Args:
        inputs: [time, rows, inputs].
        state: hidden and cell before the segment, each [rows, hidden].
        weights: shared, or with a leading `rows` dimension on any of them.

    Returns:
        outputs [time, rows, hidden] and the state after the last step.
    """
    if weights.are_shared:
        return shared_lstm(inputs, state, weights)
    return row_lstm(inputs, state, weights)


def shared_lstm(
    inputs: Tensor, state: LayerState, weights: LayerWeights
) -> tuple[Tensor, LayerState]:
    """The fused kernel of `torch.nn.LSTM`, for weights that all rows share."""
    outputs, hidden, cell = torch.lstm(
        inputs,
        [state.hidden.unsqueeze(0), state.cell.unsqueeze(0)],
        list(weights),
        has_biases=True,
        num_layers=1,
        dropout=0.0,
        train=torch.is_grad_enabled(),
        bidirectional=False,
        batch_first=False,
    )
    return outputs, LayerState(hidden.squeeze(0), cell.squeeze(0))


def row_lstm(inputs: Tensor, state: LayerState, weights: LayerWeights) -> tuple[Tensor, LayerState]:
    """Batched products, for weights of which at least one differs per row."""
    bias = weights.input_bias + weights.hidden_bias
    outputs, hidden, cell = _RowLSTM.apply(
        product_type(inputs),
        inputs.to(bias.dtype),
        state.hidden,
        state.cell,
        weights.input_weight,
        weights.hidden_weight,
        bias,
    )
    return outputs, LayerState(hidden, cell)


def _weight_gradient(
    gate_gradients: Tensor, values: Tensor, per_row: bool, dtype: torch.dtype
) -> Tensor:
    """Gradient of a weight from [rows, time, out] and [rows, time, in]: one product over time."""
    if per_row:
        return product(gate_gradients.transpose(1, 2), values.to(dtype))
    return product(gate_gradients.flatten(0, 1).t(), values.flatten(0, 1).to(dtype))


def _row_groups(hidden_weight: Tensor, rows: int) -> list[slice]:
    """How rows share the loop over time.

    A shared recurrent weight is one product for all rows. Recurrent weights of their own are read
    again at every step: on a CPU one row after the other keeps its weight in cache, on a GPU all
    rows go in one batched product.
    """
    if hidden_weight.dim() == 3 and hidden_weight.device.type == "cpu":
        return [slice(row, row + 1) for row in range(rows)]
    return [slice(0, rows)]


class _RowLSTM(torch.autograd.Function):
    """Forward and backward of one layer over one segment; rows first inside."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        inputs: Tensor,
        hidden: Tensor,
        cell: Tensor,
        input_weight: Tensor,
        hidden_weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        time, rows, _ = inputs.shape
        size = hidden.shape[-1]
        rows_first = inputs.transpose(0, 1).contiguous()
        input_weight = input_weight.to(dtype)
        if hidden_weight.dim() == 2:
            hidden_weight = hidden_weight.to(dtype)
        gates = product(rows_first, input_weight.transpose(-1, -2))
        gates += bias.unsqueeze(
            -2
        )  # [4 hidden] -> [1, 4 hidden]; [rows, 4 hidden] -> [rows, 1, 4 hidden]
        gates = gates.transpose(0, 1).contiguous()  # [time, rows, 4 hidden]
        hiddens = gates.new_empty(time + 1, rows, size)
        cells = gates.new_empty(time + 1, rows, size)
        hiddens[0], cells[0] = hidden, cell
        for group in _row_groups(hidden_weight, rows):
            weight = hidden_weight if hidden_weight.dim() == 2 else hidden_weight[group]
            for step in range(time):
                _forward_step(step, group, gates, hiddens, cells, weight)
        ctx.save_for_backward(rows_first, input_weight, hidden_weight, gates, hiddens, cells)
        ctx.bias_per_row, ctx.product_type = bias.dim() == 2, dtype
        return hiddens[1:], hiddens[time].clone(), cells[time].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_outputs: Tensor, grad_hidden: Tensor, grad_cell: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows_first, input_weight, hidden_weight, gates, hiddens, cells = ctx.saved_tensors
        time, rows, four = gates.shape
        size = four // 4
        i, f, g, o = gates.split(size, dim=-1)
        tanh_cell = cells[1:].tanh()
        # d(gate before its nonlinearity), as factors of dc (i, f, g) and of dh (o): the part
        # without recurrence.
        factors = torch.stack(
            (g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g), tanh_cell * o * (1 - o)),
            dim=2,
        )  # [time, rows, 4, hidden]
        cell_factor = o * (1 - tanh_cell * tanh_cell)
        grad_gates = torch.empty_like(factors)
        grad_h = grad_hidden.clone()
        grad_c = grad_cell.clone()
        for group in _row_groups(hidden_weight, rows):
            weight = hidden_weight if hidden_weight.dim() == 2 else hidden_weight[group]
            dh, dc = grad_h[group], grad_c[group]
            for step in range(time - 1, -1, -1):
                dh = dh + grad_outputs[step, group]
                dc = torch.addcmul(dc, dh, cell_factor[step, group])
                grad_step = grad_gates[step, group]
                torch.mul(factors[step, group, :3], dc.unsqueeze(1), out=grad_step[:, :3])
                torch.mul(factors[step, group, 3], dh, out=grad_step[:, 3])
                dc = dc * f[step, group]
                dh = _times(grad_step.flatten(1), weight)
            grad_h[group], grad_c[group] = dh, dc
        by_row = grad_gates.flatten(2).transpose(0, 1).contiguous()  # [rows, time, 4 hidden]
        needs, dtype = ctx.needs_input_grad[1:], ctx.product_type
        grad_inputs = None
        if needs[0]:
            grad_inputs = product(by_row, input_weight).transpose(0, 1)
        grad_input_weight = (
            _weight_gradient(by_row, rows_first, input_weight.dim() == 3, dtype)
            if needs[3]
            else None
        )
        grad_hidden_weight = None
        if needs[4]:
            before = hiddens[:-1].transpose(0, 1).contiguous()
            grad_hidden_weight = _weight_gradient(by_row, before, hidden_weight.dim() == 3, dtype)
        grad_bias = None
        if needs[5]:
            grad_bias = by_row.sum(1) if ctx.bias_per_row else by_row.sum((0, 1))
        return None, grad_inputs, grad_h, grad_c, grad_input_weight, grad_hidden_weight, grad_bias


def _times(values: Tensor, weight: Tensor) -> Tensor:
    """[rows, out] times weight, shared [out, in] or per row [rows, out, in]; gives [rows, in]."""
    if weight.dim() == 2:
        return product(values, weight)
    if weight.shape[0] == 1:
        return values @ weight[0]
    return torch.bmm(values.unsqueeze(1), weight).squeeze(1)


def _forward_step(
    step: int, group: slice, gates: Tensor, hiddens: Tensor, cells: Tensor, weight: Tensor
) -> None:
    """One time step for one group of rows; fills `gates`, `hiddens` and `cells` in place."""
    size = hiddens.shape[-1]
    now = gates[step, group]
    now += _times(hiddens[step, group], weight.transpose(-1, -2))
    now[:, : 2 * size].sigmoid_()
    now[:, 2 * size : 3 * size].tanh_()
    now[:, 3 * size :].sigmoid_()
    i, f, g, o = now.split(size, dim=-1)
    after = torch.mul(f, cells[step, group], out=cells[step + 1, group])
    after.addcmul_(i, g)
    torch.mul(o, after.tanh(), out=hiddens[step + 1, group])
