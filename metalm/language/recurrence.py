"""One LSTM layer over one segment, with weights shared by the rows or owned by each row.

A row is one article of a batch. Where every row has the same weights the fused kernel behind
`torch.nn.LSTM` is fastest. Where a weight differs per row it is a batched product, which
`row_recurrence.py` takes, forth and back. Both are twice differentiable on a CPU; on CUDA, torch
has the second derivative of the fused kernel without cuDNN alone (`twice_differentiable`).

Shapes: `time`, `rows`, `inputs`, `hidden`; gates are ordered i, f, g, o as in `torch.nn.LSTM`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from metalm.language.products import product_type
from metalm.language.row_recurrence import RowLSTM


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
    """Short-term memory of one layer: `hidden` and `cell`, each [rows, hidden].

    A QRNN has its last inputs in the place of `hidden` (`quasi_recurrence.py`).
    """

    hidden: Tensor
    cell: Tensor


def twice_differentiable() -> AbstractContextManager[None]:
    """Where the fused kernel of CUDA is twice differentiable too, which cuDNN's is not."""
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False)
    return context


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
    outputs, hidden, cell = RowLSTM.apply(
        product_type(inputs),
        inputs.to(bias.dtype),
        state.hidden,
        state.cell,
        weights.input_weight,
        weights.hidden_weight,
        bias,
    )
    return outputs, LayerState(hidden, cell)
