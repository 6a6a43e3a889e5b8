"""The LSTM meta-learner: forget and input gates of every coordinate, seen by a shared LSTM.

Ravi and Larochelle 2017 ("Optimization as a model for few-shot learning", section 3). The weights
themselves are the cell state of a second LSTM, whose candidate is minus the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalm.meta.parameters import Parameters
from metalm.meta.update_rule import AbstractUpdateRule

# p of their appendix A (from Andrychowicz et al. 2016).
_RANGE = 10.0
# Starts of the weights and of the gates' biases: their published code.
_WEIGHT, _FORGET, _ENTER = (-0.01, 0.01), (4.0, 5.0), (-5.0, -4.0)


class MetaLSTMState(NamedTuple):
    """Memory of all coordinates, ``[tasks, coordinates]``, or without tasks."""

    hidden: Tensor
    """``[tasks, coordinates, units]``, as the next."""
    cell: Tensor
    forget: Tensor
    """f_{t-1}."""
    enter: Tensor
    """i_{t-1}."""
    loss: Tensor
    """The step's loss, ``[tasks]`` or a scalar."""


class MetaLSTM(AbstractUpdateRule):
    """W <- f W - i g, with gates f and i of every coordinate.

        h_t = LSTM(h_{t-1}; seen(l_t), seen(g_t))
        f_t = sigmoid(w_f . [h_t, W_t, f_{t-1}] + b_f)
        i_t = sigmoid(w_i . [h_t, W_t, i_{t-1}] + b_i)
        seen(x) = (log |x| / 10, sign x), or (-1, e^10 x) where |x| < e^-10

    Their equations 2 to 5 and appendix A. The loss and the gradient are constants for the
    meta-gradient (section 3.3), which is order 1 of `unroll`.

    Args:
        slow: the parameters that learn.
        hidden: units of the LSTM.
        seed: of the first numbers.

    Raises:
        ValueError: an LSTM without units.
    """

    def __init__(self, slow: Mapping[str, Tensor], hidden: int = 20, seed: int = 0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"impossible LSTM; expected >= 1 units, found {hidden}; do change it")
        like = next(iter(slow.values())).detach()
        generator = torch.Generator().manual_seed(seed)

        def drawn(limits: tuple[float, float], *shape: int) -> nn.Parameter:
            numbers = torch.empty(shape, dtype=torch.float64).uniform_(*limits, generator=generator)
            return nn.Parameter(numbers.to(like))

        self.hidden = hidden
        self.dims = {name: tensor.dim() for name, tensor in slow.items()}
        self.into = drawn(_WEIGHT, 4 * hidden, 4)
        self.again = drawn(_WEIGHT, 4 * hidden, hidden)
        self.bias = drawn(_WEIGHT, 4 * hidden)
        self.forget_weight, self.forget_bias = drawn(_WEIGHT, hidden + 2), drawn(_FORGET, 1)
        self.enter_weight, self.enter_bias = drawn(_WEIGHT, hidden + 2), drawn(_ENTER, 1)

    def initial_state(self, fast: Parameters) -> MetaLSTMState:
        """Zeros."""
        flat = self._flat(fast).detach()
        units = flat.new_zeros(*flat.shape, self.hidden)
        gates = torch.zeros_like(flat)
        return MetaLSTMState(units, units, gates, gates, flat.new_zeros(flat.shape[:-1]))

    def observe(self, state: MetaLSTMState, losses: Tensor, aux: Any = None) -> MetaLSTMState:
        """Keep the loss, which the LSTM sees."""
        del aux
        return MetaLSTMState(*state)._replace(loss=losses)

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: MetaLSTMState | None,
        coefficients: None = None,
    ) -> tuple[Parameters, MetaLSTMState]:
        """One step; see `AbstractUpdateRule.forward`."""
        del slow, coefficients
        state = self.initial_state(fast) if state is None else MetaLSTMState(*state)
        weights = self._flat(fast)
        gradient = self._flat(gradients)
        loss = state.loss[..., None].expand(weights.shape)
        inputs = torch.stack([*_seen(loss), *_seen(gradient)], -1)
        gates = inputs @ self.into.mT + self.bias + state.hidden @ self.again.mT
        enter, keep, new, show = gates.chunk(4, -1)
        cell = enter.sigmoid() * new.tanh() + keep.sigmoid() * state.cell
        hidden = show.sigmoid() * cell.tanh()
        forget = _gate(self.forget_weight, self.forget_bias, hidden, weights, state.forget)
        taken = _gate(self.enter_weight, self.enter_bias, hidden, weights, state.enter)
        moved = forget * weights - taken * gradient
        return _parted(moved, fast), MetaLSTMState(hidden, cell, forget, taken, state.loss)

    def _flat(self, tensors: Parameters) -> Tensor:
        """All coordinates behind each other, ``[coordinates]`` or ``[tasks, coordinates]``."""
        parts = []
        for name, tensor in tensors.items():
            lead = () if tensor.dim() == self.dims[name] else (len(tensor),)
            parts.append(tensor.reshape(*lead, -1))
        return torch.cat(parts, -1)


def _gate(weight: Tensor, bias: Tensor, hidden: Tensor, fast: Tensor, before: Tensor) -> Tensor:
    """Sigmoid of w . [h, W, the gate before] + b, for every coordinate."""
    units = hidden.shape[-1]
    seen = hidden @ weight[:units] + weight[units] * fast + weight[units + 1] * before
    return (seen + bias).sigmoid()


def _seen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Size and sign of x, in numbers of about one."""
    large = x.abs() >= math.exp(-_RANGE)
    size = torch.where(large, x, 1.0).abs().log() / _RANGE
    return torch.where(large, size, -1.0), torch.where(large, x.sign(), math.exp(_RANGE) * x)


def _parted(flat: Tensor, like: Parameters) -> Parameters:
    """The tensors again."""
    tasks = flat[..., 0].numel()
    parts = flat.split([tensor.numel() // tasks for tensor in like.values()], -1)
    return {
        name: part.reshape(tensor.shape)
        for part, (name, tensor) in zip(parts, like.items(), strict=True)
    }
