"""The interface of update rules: how fast weights follow from their gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from metalm.meta.parameters import Parameters

RuleState = Any
"""What a rule carries from step to step: None, a tensor, or a tree of tensors."""

Coefficients = Any
"""What a rule works out of its own parameters once for a whole unroll (a tree of tensors)."""


class AbstractUpdateRule(nn.Module, ABC):
    """W_{t+1}, s_{t+1} = rule(W_t, g_t, W_0, s_t; phi), coordinate by coordinate.

    Every tensor of ``fast`` and ``gradients`` is ``[*shape]`` like ``slow``, or ``[rows, *shape]``.
    A subclass gives `forward`; the rest has defaults.
    """

    def initial_state(self, fast: Parameters) -> RuleState:
        """The state before the first step; None for a rule without one."""
        del fast
        return None

    def coefficients(self) -> Coefficients:
        """Whatever depends on phi alone, differentiable to it, for many steps at once.

        A caller that takes several steps with one phi works this out once and hands it to each
        step; without it every step works it out again.
        """
        return None

    def observe(self, state: RuleState, losses: Tensor, aux: Any = None) -> RuleState:
        """Give the state that knows the step's losses, before the update that learns from them.

        The loop tells every rule; one that looks at the gradient alone leaves its state as it is.

        Args:
            state: s_t.
            losses: l_t, ``[rows]`` or a scalar, taken as constants at first order.
            aux: what the loss gave to keep of the step, taken as a constant.
        """
        del losses, aux
        return state

    @abstractmethod
    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: Coefficients = None,
    ) -> tuple[Parameters, RuleState]:
        """One step, out of place, differentiable in phi, ``fast``, ``slow`` and ``state``.

        Args:
            fast: W_t.
            gradients: g_t, taken as constants.
            slow: W_0, each ``[*shape]``.
            state: s_t.
            coefficients: What `coefficients` returned, or None.

        Returns:
            W_{t+1} and s_{t+1}.
        """

    @torch.no_grad()
    def update_(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: RuleState,
        coefficients: Coefficients = None,
    ) -> RuleState:
        """The same step written into ``fast``, with no meta-gradient; returns s_{t+1}."""
        new, state = self(fast, gradients, slow, state, coefficients)
        for name, tensor in fast.items():
            tensor.copy_(new[name])
        return state
