"""Learned momentum: the learned rates' step, along the gradient and the mean of earlier ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metalm.meta.elementwise_step import step, write_step
from metalm.meta.parameters import Parameters
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.statistics import key
from metalm.meta.step_rule import StepSizes
from metalm.meta.update_rule import AbstractUpdateRule

MeanGradients = Parameters
"""m, the running mean of each fast tensor's gradients, ``[rows, *shape]`` or ``[*shape]``."""


class MomentumNumbers(NamedTuple):
    """What the rule works out once for many steps."""

    sizes: StepSizes
    """s and rho of the learned rates."""
    keeps: Parameters
    """beta of each fast tensor, a scalar."""
    shares: Parameters
    """c of each fast tensor, a scalar."""


class Momentum(AbstractUpdateRule):
    """W <- W - s (g + c m) + rho (W_0 - W),  then  m <- beta m + (1 - beta) g.

    s and rho are the learned rates'. c and beta = sigmoid(b) are learned, one number each for a
    fast tensor. c starts at 0, where the rule takes the learned rates' steps; it may become
    negative. m starts at 0 in every row, and is not corrected for having begun there: so each
    gradient moves W by s at once and by s c more in the steps after it, over about 1 / (1 - beta)
    of them.

    With no decay, c = beta / (1 - beta) is the momentum of Polyak (1964), v <- g + beta v, and
    c = beta^2 / (1 - beta^2) with s (1 + beta) for s is Nesterov's as Sutskever et al. (2013,
    section 2) have it.

    b is learned where an unroll has three updates or more: a gradient must enter m, m a step, and
    a loss must follow.

    **Memory.** A row carries m, as many numbers as its fast weights, and during an update in place
    a second m of all tensors: the old one is left as it was. A step that is to be differentiated
    keeps W_t, g_t, m_t and g_t + c m_t (the learned rates alone keep g_t), for autograd over the
    steps takes the place of their closed form.

    **Time.** An update reads g and m and writes m and g + c m before the learned rates' own kernel
    runs: on a CPU three passes over memory instead of one. Measured on one thread, for a row of 2.9
    million weights: 5 to 6 ms, where the learned rates alone take 2.2 to 2.7.

    Args:
        rates: Learned rates, which go on learning inside of this rule.
        keep: beta at the start, 0 < keep < 1.

    Raises:
        ValueError: An impossible beta.
    """

    def __init__(self, rates: LearnedRates, keep: float = 0.8) -> None:
        super().__init__()
        if not 0.0 < keep < 1.0:
            raise ValueError(
                f"impossible momentum; expected 0 < keep < 1, found {keep}; do change it"
            )
        self.rates = rates
        for name, rms in rates.rms().items():
            start = rms.new_tensor(math.log(keep / (1 - keep)))
            self.register_parameter(f"keep_logit/{key(name)}", nn.Parameter(start))
            self.register_parameter(f"share/{key(name)}", nn.Parameter(rms.new_zeros(())))

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

    def learned(self, kind: str, name: str) -> Tensor:
        """``keep_logit`` (b) or ``share`` (c) of a fast tensor."""
        # Not get_parameter, which refuses the tensors that functional_call puts in their place.
        tensor: Tensor = getattr(self, f"{kind}/{key(name)}")
        return tensor

    def initial_state(self, fast: Parameters) -> MeanGradients:
        """Zeros."""
        return {name: torch.zeros_like(fast[name]) for name in self.names}

    def coefficients(self) -> MomentumNumbers:
        """The learned rates' s and rho, and beta and c, differentiable to what is learned."""
        return MomentumNumbers(
            self.rates.coefficients(),
            {name: self.learned("keep_logit", name).sigmoid() for name in self.names},
            {name: self.learned("share", name) for name in self.names},
        )

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: MeanGradients | None,
        coefficients: MomentumNumbers | None = None,
    ) -> tuple[Parameters, MeanGradients]:
        """One step, out of place; see `AbstractUpdateRule.forward`. No state is the first one."""
        means = self.initial_state(fast) if state is None else state
        numbers = self.coefficients() if coefficients is None else coefficients
        (rates, decays), new, after = numbers.sizes, {}, {}
        for name, weight in fast.items():
            push = _push(name, gradients, means, numbers)
            new[name] = step(weight, push, slow[name], rates[name], decays[name])
            after[name] = _mean(name, gradients, means, numbers)
        return new, after

    @torch.no_grad()
    def update_(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: MeanGradients | None,
        coefficients: MomentumNumbers | None = None,
    ) -> MeanGradients:
        """The same step in place; see `AbstractUpdateRule.update_`. The state stays as it was."""
        means = self.initial_state(fast) if state is None else state
        numbers = self.coefficients() if coefficients is None else coefficients
        (rates, decays), after = numbers.sizes, {}
        for name, weight in fast.items():
            push = _push(name, gradients, means, numbers)
            write_step(weight, weight, push, slow[name], rates[name], decays[name])
            after[name] = _mean(name, gradients, means, numbers)
        return after


def _push(
    name: str, gradients: Parameters, means: MeanGradients, numbers: MomentumNumbers
) -> Tensor:
    """The gradient g and c times the mean of those before it, of one tensor."""
    return torch.addcmul(gradients[name], means[name], numbers.shares[name])


def _mean(
    name: str, gradients: Parameters, means: MeanGradients, numbers: MomentumNumbers
) -> Tensor:
    """The mean with g in it, of one tensor."""
    return torch.lerp(gradients[name], means[name], numbers.keeps[name])
