"""What the rules share that start as learned rates and put a small shared network on top."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from metalm.meta.parameters import Parameters
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.update_rule import AbstractUpdateRule, RuleState


class Sizes(NamedTuple):
    """The learned rates' numbers of every coordinate, by fast tensor, each ``[*shape]``."""

    rates: Parameters
    """s, in units of weight per gradient."""
    decays: Parameters
    """rho, the share of the way back to W_0; zeros for learned rates without decay."""
    scales: Parameters
    """r = RMS + eps, in the gradients' units; s r is the length of a typical step."""


class AbstractRatesWithNetwork(AbstractUpdateRule):
    """Learned rates, and a network that looks at each coordinate and changes its step.

    The network is shared by all tensors. It starts with its last layer at zero, and the rule then
    takes the steps of the learned rates. A subclass gives `take`.

    Args:
        rates: The learned rates, which go on learning inside of this rule.
    """

    def __init__(self, rates: LearnedRates) -> None:
        super().__init__()
        self.rates = rates

    @property
    def names(self) -> tuple[str, ...]:
        """The fast tensors."""
        return self.rates.names

    @property
    def rate_scale(self) -> Tensor:
        """What multiplies the learned rates, set on validation text."""
        return self.rates.rate_scale

    @property
    def decay_scale(self) -> Tensor:
        """What multiplies their decays, set on validation text."""
        return self.rates.decay_scale

    def coefficients(self) -> Sizes:
        """The sizes of every coordinate, differentiable to what the learned rates learn."""
        rates, decays = self.rates.coefficients()
        scales = self.rates.scales()
        spread: Parameters = {}
        for name, scale in scales.items():
            decay = decays[name]
            spread[name] = torch.as_tensor(0.0 if decay is None else decay).to(scale)
            spread[name] = spread[name].expand_as(scale)
        return Sizes({name: torch.as_tensor(rates[name]) for name in self.names}, spread, scales)

    def num_rows(self, fast: Parameters) -> int | None:
        """How many rows the fast tensors have; None where they have no such dimension."""
        for name, rms in self.rates.rms().items():
            if fast[name].dim() > rms.dim():
                return len(fast[name])
        return None

    @abstractmethod
    def take(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        sizes: Sizes,
        overwrite: bool,
    ) -> tuple[Parameters, RuleState]:
        """One step.

        Args:
            fast: W_t, each ``[rows, *shape]`` or ``[*shape]``.
            gradients: g_t, likewise.
            slow: W_0, each ``[*shape]``.
            state: s_t.
            sizes: Of the learned rates.
            overwrite: Whether W_{t+1} may be written into ``fast``, where that is contiguous.
        """

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: Sizes | None = None,
    ) -> tuple[Parameters, RuleState]:
        """One step, out of place; see `AbstractUpdateRule.forward`. No state is the first one."""
        state = self.initial_state(fast) if state is None else state
        sizes = self.coefficients() if coefficients is None else coefficients
        return self.take(fast, gradients, slow, state, sizes, overwrite=False)

    @torch.no_grad()
    def update_(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: Sizes | None = None,
    ) -> RuleState:
        """The same step in place; see `AbstractUpdateRule.update_`."""
        state = self.initial_state(fast) if state is None else state
        sizes = self.coefficients() if coefficients is None else coefficients
        new, state = self.take(fast, gradients, slow, state, sizes, overwrite=True)
        for name, weight in fast.items():
            if new[name].data_ptr() != weight.data_ptr():
                weight.copy_(new[name])
        return state


def by_unit(tensor: Tensor, slow: Tensor, dims: int = 1) -> Tensor:
    """A fast tensor, or a slow one as one row, with its own shape flattened to ``dims``.

    Args:
        tensor: ``[rows, *shape]`` or ``[*shape]``.
        slow: ``[*shape]``.
        dims: 1 for a unit a coordinate, 2 for a unit a row of the tensor.

    Returns:
        ``[rows, units]`` or ``[rows, units, coordinates]``; a view where that is possible.
    """
    tensor = tensor if tensor.dim() > slow.dim() else tensor[None]
    return tensor.reshape(*tensor.shape[:dims], -1)
