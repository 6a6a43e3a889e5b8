"""The recurrence with weights per row as one operation of autograd, twice differentiable.

Autograd through a loop over time would add a `rows x |W|` gradient at every step. Here a whole
segment keeps its gates, and each weight gradient is ONE product over time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.language.network.products import product, without_autocast
from metalm.language.network.row_second_derivative import Direction, second_derivative
from metalm.language.network.row_walks import (
    Reading,
    Walk,
    Walked,
    bias_gradient,
    over_time,
    read,
    rows_first,
    slopes_of,
)


class RowLSTM(torch.autograd.Function):
    """From (inputs, h, c, W, U, b) to (outputs, last h, last c); see `row_walks.py`."""

    @staticmethod
    @without_autocast
    def forward(  # noqa: D102 - of autograd
        ctx: Any,
        dtype: torch.dtype,
        inputs: Tensor,
        hidden: Tensor,
        cell: Tensor,
        input_weight: Tensor,
        hidden_weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        reading = read(dtype, inputs, hidden, cell, input_weight, hidden_weight, bias)
        _, *kept = reading
        ctx.dtype = dtype
        ctx.save_for_backward(inputs, hidden, cell, input_weight, hidden_weight, bias, *kept)
        return reading.hiddens[1:], reading.hiddens[-1].clone(), reading.cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        _, *needs = ctx.needs_input_grad
        asked = _Asked(ctx.dtype, tuple(needs), torch.is_grad_enabled())
        return None, *_RowGradient.apply(asked, *incoming, *ctx.saved_tensors)


class _Asked(NamedTuple):
    """How the gradient is to be taken."""

    dtype: torch.dtype
    """Type of the products."""
    needs: tuple[bool, ...]
    """Of inputs, h, c, W, U and b."""
    twice: bool
    """Whether the gradient is to be differentiable itself."""


class _RowGradient(torch.autograd.Function):
    """(incoming gradients, what `RowLSTM` took, what its forward left) -> its gradients."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, asked: _Asked, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        incoming, taken, kept = tensors[:3], tensors[3:9], tensors[9:]
        inputs, bias = taken[0], taken[5]
        reading = Reading(inputs, *kept)
        to_outputs, to_hidden, to_cell = incoming
        walked = Walk(to_outputs, to_hidden, to_cell).back(reading, slopes_of(reading), asked.twice)
        if asked.twice:
            ctx.set_materialize_grads(False)
            ctx.dtype, ctx.bias_per_row = asked.dtype, bias.dim() == 2
            ctx.save_for_backward(*reading, *walked[:3])
        by_row = rows_first(walked.gates)
        own, recurrent, dtype = reading.input_weight, reading.hidden_weight, asked.dtype
        to_inputs = to_own = to_recurrent = to_bias = None
        if asked.needs[0]:
            to_inputs = product(by_row, own).transpose(0, 1)
        if asked.needs[3]:
            to_own = over_time(by_row, rows_first(inputs), own, dtype)
        if asked.needs[4]:
            to_recurrent = over_time(by_row, reading.before, recurrent, dtype)
        if asked.needs[5]:
            to_bias = bias_gradient(by_row, bias.dim() == 2)
        return to_inputs, walked.hidden, walked.cell, to_own, to_recurrent, to_bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor | None, ...]:
        *kept, gates, hiddens, cells = ctx.saved_tensors
        found = second_derivative(
            Reading(*kept),
            Walked(gates, hiddens, cells, None, None),
            Direction(*direction),
            ctx.dtype,
            ctx.bias_per_row,
        )
        return None, *found, *(None,) * len(kept[1:])
