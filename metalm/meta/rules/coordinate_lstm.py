"""Coordinatewise LSTM: a small recurrent network, shared by all coordinates, adds to each step.

After Andrychowicz et al. 2016 ("Learning to learn by gradient descent by gradient descent", section
2.1 and appendix A), whose optimiser has a hidden state for every coordinate. That is many times the
weights themselves, so large tensors get one state for each of their rows here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metalm.meta.parameters import Parameters
from metalm.meta.rules.in_chunks import Operands, in_chunks
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.rates_with_network import AbstractRatesWithNetwork, Sizes, by_unit

# p of their appendix A: gradients are told apart down to e^-p of their usual size.
_RANGE = 10.0
_INPUTS = 3
# Numbers that a chunk holds for each of its quantities.
_CHUNK = 65536


class LSTMState(NamedTuple):
    """The network's memory, for each fast tensor ``[rows, units, hidden]``, or without rows."""

    hidden: Parameters
    cell: Parameters


class CoordinateLSTM(AbstractRatesWithNetwork):
    """W <- (the step of the learned rates) + what an LSTM has to add, zero at the start.

    With the learned rates' s, rho and r = RMS + eps, d = W - W_0, and h the state after the LSTM
    has seen x, **tensors of at most ``coordinates`` numbers**, and vectors, have a state for each
    coordinate:

        x = log(max(|y|, e^-10)) / 10, clamp(e^10 y, -1, 1), d / (|d| + s r),  y = g / r
        W <- W - s g + rho (W_0 - W) - s r (o . h)

    The first two are appendix A's, of a gradient in units of its usual size; the third is not in
    the paper, whose weights have no home. s r is the length of a typical step. **Larger tensors**
    have a state for each row (first dimension), and a second LSTM that sees means over the row:

        x = means of the first above, of |d| / (|d| + s r), of g d / (|g| + r) / (|d| + s r)
        W <- W - s (1 + o_1 . h) g + (rho + o_2 . h) (W_0 - W)

    One layer of ``hidden`` units; the paper's has two of 20.

    **Memory.** ``2 hidden`` numbers for each state, in every row of fast weights (article);
    `state_size` counts them. A step that is to be differentiated keeps W_t, g_t and the state.

    Args:
        rates: Learned rates.
        hidden: Units of the LSTM.
        coordinates: Size up to which each coordinate of a tensor has a state of its own.
        seed: Of the LSTM's first numbers.

    Raises:
        ValueError: Fewer than one unit, or a negative size.
    """

    def __init__(
        self, rates: LearnedRates, hidden: int = 8, coordinates: int = 20_000, seed: int = 0
    ) -> None:
        super().__init__(rates)
        if hidden < 1:
            raise ValueError(f"impossible LSTM; expected >= 1 units, found {hidden}; do change it")
        if coordinates < 0:
            raise ValueError(
                f"impossible size; expected >= 0 coordinates, found {coordinates}; do change it"
            )
        self.hidden, self.coordinates = hidden, coordinates
        generator = torch.Generator().manual_seed(seed)
        rms = rates.rms()
        self.of_coordinates = _Cell(next(iter(rms.values())), hidden, 1, generator)
        self.of_rows = _Cell(next(iter(rms.values())), hidden, 2, generator)

    def units(self) -> dict[str, int]:
        """How many states each fast tensor has in a row of fast weights."""
        return {
            name: len(rms) if self._by_row(rms) else rms.numel()
            for name, rms in self.rates.rms().items()
        }

    def state_size(self) -> int:
        """How many numbers a row of fast weights adds to the state."""
        return 2 * self.hidden * sum(self.units().values())

    def initial_state(self, fast: Parameters) -> LSTMState:
        """Zeros."""
        rows = self.num_rows(fast)
        rms = self.rates.rms()

        def zeros() -> Parameters:
            return {
                name: rms[name].new_zeros(*(() if rows is None else (rows,)), units, self.hidden)
                for name, units in self.units().items()
            }

        return LSTMState(zeros(), zeros())

    def take(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: LSTMState,
        sizes: Sizes,
        overwrite: bool,
    ) -> tuple[Parameters, LSTMState]:
        """One step; see `AbstractRatesWithNetwork.take`."""
        before = LSTMState(*state)  # a plain tuple where it was saved and loaded
        new: Parameters = {}
        after = LSTMState({}, {})
        for name, home in slow.items():
            by_row = self._by_row(home)
            dims = 2 if by_row else 1
            weight = by_unit(fast[name], home, dims)
            shape = (len(weight), -1, self.hidden)
            flat = (home, *(kind[name] for kind in sizes))
            operands = Operands(
                [
                    weight,
                    by_unit(gradients[name], home, dims),
                    *(memory[name].reshape(shape) for memory in before),
                ],
                [by_unit(tensor, home, dims)[0] for tensor in flat],
                (self.of_rows if by_row else self.of_coordinates).numbers(),
            )
            (moved, hidden, cell), _ = in_chunks(
                _move_rows if by_row else _move_coordinates,
                operands,
                _CHUNK // (weight[:, 0].numel() if by_row else len(weight) * self.hidden),
                [weight] if overwrite and fast[name].is_contiguous() else (),
            )
            new[name] = moved.view(fast[name].shape)
            after.hidden[name] = hidden.reshape(before.hidden[name].shape)
            after.cell[name] = cell.reshape(before.cell[name].shape)
        return new, after

    def _by_row(self, slow: Tensor) -> bool:
        return slow.dim() > 1 and slow.numel() > self.coordinates


class _Cell(nn.Module):
    """The numbers of one LSTM and of its last layer, which starts at zero."""

    def __init__(self, like: Tensor, hidden: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        scale = 1 / math.sqrt(_INPUTS + hidden)
        drawn = torch.randn(4 * hidden, _INPUTS + hidden, generator=generator, dtype=torch.float64)
        bias = torch.zeros(4 * hidden, dtype=torch.float64)
        bias[hidden : 2 * hidden] = 1.0  # the forget gate's, so that it remembers at first
        self.weight = nn.Parameter((scale * drawn).to(like))
        self.bias = nn.Parameter(bias.to(like))
        self.out = nn.Parameter(like.new_zeros(outputs, hidden))

    def numbers(self) -> list[Tensor]:
        """What its function takes: weights, biases, the last layer."""
        return [self.weight, self.bias, self.out]


def _move_coordinates(operands: Operands) -> tuple[tuple[Tensor, ...], Tensor]:
    """W_{t+1} ``[rows, units]`` and the states, where every coordinate is a unit."""
    rate, scale = operands.flat[1], operands.flat[3]
    y, _, pull = _seen(operands)
    sign = (math.exp(_RANGE) * y).clamp(-1, 1)
    hidden, cell = _remembered(operands, [_logarithm(y), sign, pull])
    addition = (hidden @ operands.shared[-1].T).squeeze(-1)
    moved = _learned_step(operands, 1.0, 0.0) - rate * scale * addition
    return (moved, hidden, cell), moved.new_zeros(1)


def _move_rows(operands: Operands) -> tuple[tuple[Tensor, ...], Tensor]:
    """W_{t+1} ``[rows, units, coordinates]`` and the states, for a unit a row of the tensor."""
    y, push, pull = _seen(operands)
    means = [part.mean(-1) for part in (_logarithm(y), pull.abs(), push * pull)]
    hidden, cell = _remembered(operands, means)
    update, flush = (hidden @ operands.shared[-1].T)[..., None, :].unbind(-1)
    moved = _learned_step(operands, 1 + update, flush)
    return (moved, hidden, cell), moved.new_zeros(1)


def _seen(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient in units of its usual size, and g and d with |.| / (|.| + unit)."""
    weight, gradient, *_ = operands.stacked
    slow, rate, _, scale = operands.flat
    away = weight - slow
    # A rate of zero reaches nowhere; a distance of zero from there is not a number without this.
    reach = rate * scale + torch.finfo(weight.dtype).tiny
    return gradient / scale, gradient / (gradient.abs() + scale), away / (away.abs() + reach)


def _logarithm(y: Tensor) -> Tensor:
    """The first input of appendix A, -1 to about 1."""
    return y.abs().clamp(min=math.exp(-_RANGE)).log() / _RANGE


def _remembered(operands: Operands, x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of the LSTM: (hidden, cell), each ``[rows, units, hidden]``."""
    hidden, cell = operands.stacked[2:]
    weight, bias, _ = operands.shared
    gates = torch.cat([torch.stack(x, -1), hidden], -1) @ weight.T + bias
    enter, keep, new, show = gates.chunk(4, -1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _learned_step(operands: Operands, update: Tensor | float, flush: Tensor | float) -> Tensor:
    """W - update s g + (rho + flush) (W_0 - W)."""
    weight, gradient, *_ = operands.stacked
    slow, rate, decay, _ = operands.flat
    home = torch.lerp(weight, slow.expand_as(weight), (decay + flush).expand_as(weight))
    return torch.addcmul(home, update * rate, gradient, value=-1)
