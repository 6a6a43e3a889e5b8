"""The recurrent layers of the language model, behind one interface.

A layer owns its weights and computes in `recurrence.py` or `quasi_recurrence.py`; any of its
parameters may be given with a leading `rows` dimension through `torch.func.functional_call`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from metalm.language.network.quasi_recurrence import qrnn_layer
from metalm.language.network.recurrence import LayerState, LayerWeights, lstm_layer

Cell = Literal["lstm", "qrnn"]


class AbstractLayer(nn.Module, ABC):
    """What the language model asks of a layer."""

    @abstractmethod
    def initial_state(self, rows: int) -> LayerState:
        """Zeros, for `rows` streams of text."""

    @abstractmethod
    def forward(
        self, inputs: Tensor, state: LayerState, weight_dropout: float
    ) -> tuple[Tensor, LayerState]:
        """Runs over a segment.

        Args:
            inputs: [time, rows, inputs].
            state: from before the segment.
            weight_dropout: probability of DropConnect; 0 outside of training.

        Returns:
            outputs [time, rows, hidden] and the state after the last step.
        """


class LSTMLayer(AbstractLayer):
    """A layer of `torch.nn.LSTM`, with DropConnect on the recurrent weights.

    Initialised as `torch.nn.LSTM` (uniform in 1/sqrt(hidden)), with 1 added to the forget gate's
    bias (Jozefowicz, Zaremba, Sutskever 2015, section 2.2): without it and the model's output
    bias, long stretches of training are lost on a plateau at the unigram loss.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(hidden_size)
        self.hidden_size = hidden_size
        self.input_weight = nn.Parameter(
            torch.empty(4 * hidden_size, input_size).uniform_(-bound, bound)
        )
        self.hidden_weight = nn.Parameter(
            torch.empty(4 * hidden_size, hidden_size).uniform_(-bound, bound)
        )
        self.input_bias = nn.Parameter(torch.empty(4 * hidden_size).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.empty(4 * hidden_size).uniform_(-bound, bound))
        with torch.no_grad():
            self.hidden_bias[hidden_size : 2 * hidden_size] += 1.0  # gates are ordered i, f, g, o

    def initial_state(self, rows: int) -> LayerState:  # noqa: D102 - of the interface
        zeros = self.hidden_bias.new_zeros(rows, self.hidden_size)
        return LayerState(zeros, zeros.clone())

    def forward(  # noqa: D102 - of the interface
        self, inputs: Tensor, state: LayerState, weight_dropout: float
    ) -> tuple[Tensor, LayerState]:
        hidden_weight = thinned(self.hidden_weight, weight_dropout)
        weights = LayerWeights(self.input_weight, hidden_weight, self.input_bias, self.hidden_bias)
        return lstm_layer(inputs, state, weights)


class QRNNLayer(AbstractLayer):
    """A quasi-recurrent layer, with DropConnect on its only weight, as AWD-QRNN has it.

    Initialised as `torch.nn.Linear` (uniform in 1/sqrt(inputs)).

    Args:
        input_size: of each input.
        hidden_size: of the cell and the output.
        window: inputs that each step sees.
    """

    def __init__(self, input_size: int, hidden_size: int, window: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(window * input_size)
        self.hidden_size = hidden_size
        self.remembered = (window - 1) * input_size
        self.input_weight = nn.Parameter(
            torch.empty(3 * hidden_size, window * input_size).uniform_(-bound, bound)
        )
        self.input_bias = nn.Parameter(torch.empty(3 * hidden_size).uniform_(-bound, bound))

    def initial_state(self, rows: int) -> LayerState:  # noqa: D102 - of the interface
        like = self.input_bias
        return LayerState(
            like.new_zeros(rows, self.remembered), like.new_zeros(rows, self.hidden_size)
        )

    def forward(  # noqa: D102 - of the interface
        self, inputs: Tensor, state: LayerState, weight_dropout: float
    ) -> tuple[Tensor, LayerState]:
        return qrnn_layer(
            inputs, state, thinned(self.input_weight, weight_dropout), self.input_bias
        )


def make_layer(cell: Cell, place: int, input_size: int, hidden_size: int) -> AbstractLayer:
    """The layer that stands at a place (from 0) of the model.

    Raises:
        ValueError: no such cell.
    """
    if cell == "lstm":
        return LSTMLayer(input_size, hidden_size)
    if cell == "qrnn":  # a window of 2 in the first layer only, as in AWD-QRNN
        return QRNNLayer(input_size, hidden_size, window=2 if place == 0 else 1)
    raise ValueError(
        f"unknown cell; expected one of {', '.join(get_args(Cell))}, found {cell!r}; correct "
        "model.cell"
    )


def thinned(weight: Tensor, probability: float) -> Tensor:
    """DropConnect: one mask for all time steps and rows (Merity, Keskar, Socher 2018, section 2).

    Args:
        weight: [outputs, inputs], or with a leading `rows` dimension.
        probability: that a connection is dropped; the others are scaled up.
    """
    if probability == 0.0:
        return weight
    mask = weight.new_empty(weight.shape[-2:])
    return weight * mask.bernoulli_(1 - probability).div_(1 - probability)
