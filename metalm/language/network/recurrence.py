"""One LSTM layer over one segment, with weights shared by the rows or owned by each row.

A row is one article of a batch. Where every row has the same weights the fused kernel behind
`torch.nn.LSTM` is fastest. Where a weight differs per row it is a batched product, which
`row_recurrence.py` takes, forth and back. Both are twice differentiable on a CPU; on CUDA, torch
has the second derivative of the fused kernel without cuDNN alone (`twice_differentiable`). With
cuDNN that kernel also takes the weights of the one row that is read alone, and sizes are filled up
with zeros to what matrix units take (`filled_up`).

Shapes: `time`, `rows`, `inputs`, `hidden`; gates are ordered i, f, g, o as in `torch.nn.LSTM`.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from metalm.language.network.products import product_type
from metalm.language.network.row_recurrence import RowLSTM

_MATRIX_UNIT = 8
"""Sizes have to be multiples of this for the matrix units of NVIDIA's GPUs, in any type."""

_FILLED_ROWS = 16
"""From so many rows on that pays: fewer take their time for reading the weights."""


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

    def of_one_row(self) -> LayerWeights:
        """The same without the dimension of rows, of which there is one."""
        shared = (2, 2, 1, 1)
        return LayerWeights(
            *(w if w.dim() == d else w.squeeze(0) for w, d in zip(self, shared, strict=True))
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
    if inputs.shape[1] == 1 and has_cudnn(inputs):
        return shared_lstm(inputs, state, weights.of_one_row())
    return row_lstm(inputs, state, weights)


def has_cudnn(tensor: Tensor) -> bool:
    """Whether the fused kernel is cuDNN's for such a tensor, which is differentiable once."""
    return tensor.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()


def shared_lstm(
    inputs: Tensor, state: LayerState, weights: LayerWeights
) -> tuple[Tensor, LayerState]:
    """The fused kernel of `torch.nn.LSTM`, for weights that all rows share."""
    if has_cudnn(inputs):
        return _cudnn_lstm(inputs, state, weights)
    return _fused_lstm(inputs, state, weights)


def _cudnn_lstm(
    inputs: Tensor, state: LayerState, weights: LayerWeights
) -> tuple[Tensor, LayerState]:
    """In the type of the products; torch's own autocast would take float16, which has no range."""
    dtype, size = product_type(inputs), state.hidden.shape[-1]
    if inputs.shape[1] >= _FILLED_ROWS:
        inputs, state, weights = filled_up(inputs, state, weights, _MATRIX_UNIT)
    with torch.autocast("cuda", enabled=False), warnings.catch_warnings():
        # Weights that are thinned, or of one row of many, are new ones every time.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of")
        outputs, after = _fused_lstm(
            inputs.to(dtype),
            LayerState(*(part.to(dtype) for part in state)),
            LayerWeights(*(weight.to(dtype) for weight in weights)),
        )
    kept = (part[:, :size].to(state.hidden.dtype) for part in after)
    return outputs[..., :size], LayerState(*kept)


def _fused_lstm(
    inputs: Tensor, state: LayerState, weights: LayerWeights
) -> tuple[Tensor, LayerState]:
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


def filled_up(
    inputs: Tensor, state: LayerState, weights: LayerWeights, multiple: int
) -> tuple[Tensor, LayerState, LayerWeights]:
    """The same layer with sizes that are multiples of a number, and the same outputs in front.

    Units that are added have zeros for weights, so that g = tanh(0) = 0, and their c and h stay 0;
    inputs that are added are 0. AWD-LSTM's 1,150 units keep cuDNN from the matrix units of a GPU.

    Args:
        inputs: [time, rows, inputs].
        state: each [rows, hidden].
        weights: of rows that share them.
        multiple: of `inputs` and of `hidden`.
    """
    more_inputs = -inputs.shape[-1] % multiple
    more = -state.hidden.shape[-1] % multiple
    if more_inputs == more == 0:
        return inputs, state, weights

    def fill(weight: Tensor, columns: int) -> Tensor:
        # [4 hidden, n] by gates, each of which gets units of its own at its end.
        return pad(weight.unflatten(0, (4, -1)), (0, columns, 0, more)).flatten(0, 1)

    filled = LayerWeights(
        fill(weights.input_weight, more_inputs),
        fill(weights.hidden_weight, more),
        *(pad(bias.unflatten(0, (4, -1)), (0, more)).flatten() for bias in weights[2:]),
    )
    return (
        pad(inputs, (0, more_inputs)),
        LayerState(*(pad(part, (0, more)) for part in state)),
        filled,
    )


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
