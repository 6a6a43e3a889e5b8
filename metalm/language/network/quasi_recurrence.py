"""One quasi-recurrent layer over one segment, with weights shared by the rows or owned by each row.

QRNN with fo-pooling (Bradbury, Merity, Xiong, Socher 2017, section 2, equations 1 and 4):

    z_t, f_t, o_t = tanh, sigmoid, sigmoid of W (x_{t-w+1} ... x_t) + b
    c_t = f_t c_{t-1} + (1 - f_t) z_t        h_t = o_t c_t

No product has anything recurrent in it: each is one (batched) product over the whole segment, and
what goes on in time is elementwise. Twice differentiable everywhere.

Shapes: `time`, `rows`, `inputs`, `hidden`; gates are ordered z, f, o.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.language.network.recurrence import LayerState
from metalm.language.network.row_linear import row_linear
from metalm.language.network.scan import scan


def qrnn_layer(
    inputs: Tensor, state: LayerState, weight: Tensor, bias: Tensor
) -> tuple[Tensor, LayerState]:
    """Runs one layer over a segment.

    Args:
        inputs: [time, rows, inputs].
        state: in `hidden` the last w - 1 inputs, [rows, (w - 1) inputs]; and the cell,
            [rows, hidden].
        weight: [3 hidden, w inputs], or with a leading `rows` dimension; the oldest input first.
        bias: [3 hidden], or with rows.

    Returns:
        outputs [time, rows, hidden] and the state after the last step.
    """
    windows, last = windows_of(inputs.to(bias.dtype), state.hidden)
    gates = row_linear(windows, weight, bias).to(bias.dtype)
    candidate, forget, output = gates.chunk(3, dim=-1)
    forget = forget.sigmoid()
    added = (1 - forget) * candidate.tanh()
    # The cell from before is the scan's first value; nothing leads to it.
    cells = scan(forget, torch.cat((state.cell.unsqueeze(0), added)))[1:]
    return output.sigmoid() * cells, LayerState(last, cells[-1])


def windows_of(inputs: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The last w inputs at each step, the oldest first.

    Args:
        inputs: [time, rows, inputs].
        before: the w - 1 inputs before them, [rows, (w - 1) inputs].

    Returns:
        [time, rows, w inputs], and what is `before` for the next segment.
    """
    time, _, size = inputs.shape
    more = before.shape[-1] // size
    if more == 0:
        return inputs, before
    source = torch.cat((before.unflatten(-1, (more, size)).transpose(0, 1), inputs))
    windows = torch.cat([source[lag : lag + time] for lag in range(more + 1)], dim=-1)
    return windows, source[time:].transpose(0, 1).flatten(1)
