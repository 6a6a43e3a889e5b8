"""Gated fast weights: each coordinate is copied, updated or flushed to W_0, as it and its row ask.

After Wolf, Chaumond, Delangue 2018 ("Meta-learning a dynamical language model"), who let a small
network that all weights share combine three answers: keep the weight, take a step, go back to the
static weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metalm.meta.parameters import Parameters
from metalm.meta.rules import gate_kernels, loss_memory
from metalm.meta.rules.gate_kernels import GateStep
from metalm.meta.rules.in_chunks import Operands, in_chunks
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.rates_with_network import AbstractRatesWithNetwork, Sizes, by_unit
from metalm.meta.rules.statistics import mean_over_tensors

GateState = dict[str, Tensor]

OF_COORDINATES = ("gradient", "weight", "distance", "homeward", "rms")
"""What the network sees of a coordinate, each in [-1, 1]; see `Gated`."""

OF_ROWS = loss_memory.FEATURES
"""What it sees of the row (the article); see `loss_memory.py`."""

# Beyond it a gate is open or shut in float32.
_LARGEST = 30.0
# Coordinates times rows in a chunk: a quarter of a megabyte for each number of a coordinate.
_CHUNK = 65536


class Gated(AbstractRatesWithNetwork):
    """W <- copy W + flush W_0 - update s g, with copy = 1 - flush, for each coordinate.

        update = 2 sigmoid(z_1)                       1 where the network says nothing
        flush  = rho e^z_2 / (1 + rho (e^z_2 - 1))    the sigmoid of logit(rho) + z_2
        z      = C x + R y + b,  or  O tanh(C x + R y + b) with ``hidden`` units

    s and rho are the learned rates' own, and r = RMS + eps is theirs too. x is seen of the
    coordinate, with |.| / (|.| + unit), so that no outlier rules:

        gradient |g| / (|g| + r)      weight |W| / (|W| + s r)      distance |d| / (|d| + s r)
        homeward g d / (|g| + r) / (|d| + s r), d = W - W_0: positive where the step leads home
        rms      r / (r + the mean RMS of all tensors)

    s r is the length of a typical step. y is seen of the row (the article): ``loss`` of the step
    that is learnt from, its ``surprise`` and ``drift`` against earlier ones, and ``position``, as
    `loss_memory.py` has them.

    **State and memory.** A row carries 5 numbers and 2 for each tensor. A step that is to be
    differentiated keeps W_t and g_t (the learned rates alone keep g_t); what the network holds is
    there for one chunk of coordinates at a time.

    Args:
        rates: Learned rates, with a decay: the flush gate starts there.
        hidden: Units of a hidden layer; 0 for gates that are linear before their sigmoid, which is
            what Wolf et al. are said to have found best.
        sees: Names of what the network sees, of `OF_COORDINATES` and `OF_ROWS`; what it does not
            see costs nothing.
        seed: Of the hidden layer's first numbers.

    Raises:
        ValueError: Learned rates without a decay, a name that is neither, or fewer than 0 units.
    """

    mean_rms: Tensor

    def __init__(
        self,
        rates: LearnedRates,
        hidden: int = 0,
        sees: Sequence[str] = (*OF_COORDINATES, *OF_ROWS),
        seed: int = 0,
    ) -> None:
        super().__init__(rates)
        _check(rates, hidden, sees)
        self.hidden = hidden
        self.sees = tuple(name for name in OF_COORDINATES if name in sees)
        self.sees_of_row = tuple(name for name in OF_ROWS if name in sees)
        self.register_buffer("mean_rms", mean_over_tensors(rates.rms()))
        zeros, width = self.mean_rms.new_zeros, hidden or 2
        self.from_coordinate = nn.Parameter(zeros(width, len(self.sees)))
        self.from_row = nn.Parameter(zeros(width, len(self.sees_of_row)))
        self.bias = nn.Parameter(zeros(width))
        self.out = nn.Parameter(zeros(2, hidden)) if hidden else None
        if hidden:
            generator = torch.Generator().manual_seed(seed)
            scale = 1 / math.sqrt(len(self.sees) + len(self.sees_of_row) + 1)
            for parameter in (self.from_coordinate, self.from_row, self.bias):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(scale * drawn)

    def initial_state(self, fast: Parameters) -> GateState:
        """No loss was seen yet.

        Returns:
            The row's losses (`loss_memory.py`), each ``[rows]`` or a scalar, and ``gates``, which
            `mean_gates` reads.
        """
        rows = self.num_rows(fast)
        shape = () if rows is None else (rows,)
        state = loss_memory.fresh(shape, self.mean_rms)
        return state | {"gates": self.mean_rms.new_zeros(*shape, len(self.names), 2)}

    def observe(self, state: GateState, losses: Tensor, aux: Any = None) -> GateState:
        """Remember the loss of the step at hand."""
        del aux
        return state | {"loss": losses.to(state["loss"])}

    def mean_gates(self, state: GateState) -> dict[str, Tensor]:
        """The gates of the last step: for each tensor the means of (update, flush).

        Returns:
            By name, ``[rows, 2]`` or ``[2]``; zeros before the first step.
        """
        return dict(zip(self.names, state["gates"].unbind(-2), strict=True))

    def take(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: GateState,
        sizes: Sizes,
        overwrite: bool,
    ) -> tuple[Parameters, GateState]:
        """One step; see `AbstractRatesWithNetwork.take`."""
        shape = state["loss"].shape
        seen = loss_memory.features(state, self.sees_of_row).view(
            shape.numel(), len(self.sees_of_row)
        )
        at_row = seen @ self.from_row.T + self.bias
        new: Parameters = {}
        means: list[Tensor] = []
        for name, home in slow.items():
            flat = [by_unit(tensor, home)[0] for tensor in (home, *(kind[name] for kind in sizes))]
            moved, total = self._move_tensor(
                by_unit(fast[name], home),
                by_unit(gradients[name], home),
                flat,
                at_row,
                overwrite and fast[name].is_contiguous(),
            )
            new[name] = moved.view(fast[name].shape)
            means.append(total / home.numel())
        gates = torch.stack(means, 1).reshape(*shape, len(means), 2)
        return new, loss_memory.after_the_step(state) | {"gates": gates}

    def _move_tensor(
        self,
        weight: Tensor,
        gradient: Tensor,
        flat: Sequence[Tensor],
        at_row: Tensor,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        """W_{t+1} of one tensor, ``[rows, coordinates]``, and the sums of its gates."""
        if self.out is None:
            slow, rate, decay, scale = flat
            seen = self._with_unseen()
            step = GateStep(weight, gradient, slow, rate, decay, scale, at_row, seen, self.mean_rms)
            if gate_kernels.fits(step):
                return gate_kernels.move(step, overwrite)
        (moved,), total = in_chunks(
            partial(_move, sees=self.sees),
            Operands(
                [weight, gradient],
                flat,
                [at_row, self.from_coordinate, self.mean_rms]
                + ([] if self.out is None else [self.out]),
            ),
            _CHUNK // len(weight),
            [weight] if overwrite else (),
        )
        return moved, total

    def _with_unseen(self) -> Tensor:
        """C with a column of zeros for each feature that is not seen."""
        if len(self.sees) == len(OF_COORDINATES):
            return self.from_coordinate
        columns = self.from_coordinate.new_zeros(2, len(OF_COORDINATES))
        at = [OF_COORDINATES.index(name) for name in self.sees]
        return columns.index_copy(
            1, torch.tensor(at, dtype=torch.int64, device=columns.device), self.from_coordinate
        )


def _move(operands: Operands, sees: Sequence[str]) -> tuple[tuple[Tensor], Tensor]:
    """W_{t+1} of a chunk, and the sums of its two gates, ``[rows, 2]``."""
    weight, gradient = operands.stacked
    slow, rate, decay, _ = operands.flat
    at_row, from_coordinate, mean_rms, *out = operands.shared
    z = at_row.T[:, :, None]
    if sees:
        x = torch.stack(_of_coordinate(operands, mean_rms, sees)).flatten(1)
        z = (from_coordinate @ x).view(-1, *weight.shape) + z
    if out:
        z = (out[0] @ z.tanh().flatten(1)).view(2, *z.shape[1:])
    first, second = z.clamp(-_LARGEST, _LARGEST)
    update = 2 * first.sigmoid()
    odds = second.exp()
    flush = (decay * odds / (1 + decay * (odds - 1))).expand_as(weight)
    moved = torch.lerp(weight, slow.expand_as(weight), flush)
    moved = torch.addcmul(moved, update * rate, gradient, value=-1)
    sums = [gate.detach().expand_as(weight).sum(1) for gate in (update, flush)]
    return (moved,), torch.stack(sums, 1)


def _of_coordinate(operands: Operands, mean_rms: Tensor, sees: Sequence[str]) -> list[Tensor]:
    """x: the features asked for, each ``[rows, units]``."""
    weight, gradient = operands.stacked
    slow, rate, _, scale = operands.flat
    # A rate of zero reaches nowhere; a distance of zero from there is not a number without this.
    reach = rate * scale + torch.finfo(weight.dtype).tiny
    away = weight - slow
    push = gradient / (gradient.abs() + scale)
    pull = away / (away.abs() + reach)
    features: dict[str, Callable[[], Tensor]] = {
        "gradient": push.abs,
        "weight": lambda: weight.abs() / (weight.abs() + reach),
        "distance": pull.abs,
        "homeward": lambda: push * pull,
        "rms": lambda: (scale / (scale + mean_rms)).expand_as(weight),
    }
    return [features[name]() for name in sees]


def _check(rates: LearnedRates, hidden: int, sees: Sequence[str]) -> None:
    if not rates.has_decay:
        raise ValueError(
            "learned rates that never decay cannot be flushed; expected a decay > 0 at the start, "
            "found 0; do start from learned rates with a decay"
        )
    if hidden < 0:
        raise ValueError(f"impossible hidden layer; expected >= 0 units, found {hidden}; change it")
    known = (*OF_COORDINATES, *OF_ROWS)
    for name in sees:
        if name not in known:
            raise ValueError(
                f"the gates cannot see {name!r}; expected some of {', '.join(known)}, found "
                f"{name!r}; do correct the name"
            )
