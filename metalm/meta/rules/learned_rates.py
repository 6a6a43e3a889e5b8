"""Learned rates: gradient descent and Krause's RMS rule as two members of one learned family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from metalm.meta.parameters import Parameters
from metalm.meta.rules.scaled_power import scaled_power
from metalm.meta.rules.statistics import key, relative_rms
from metalm.meta.step_rule import AbstractStepRule, StepSizes

Granularity = Literal["tensor", "row", "coordinate"]
DecayShape = Literal["uniform", "rms"]

# A decay of 1 forgets everything at once and has no finite logit.
_LARGEST_DECAY = 0.999


class LearnedRates(AbstractStepRule):
    """W <- W - c exp(a) (RMS + eps)^(-p) g + rho (W_0 - W); a, p, eps and rho are learned.

    For each tensor: eps = exp(e) times the tensor's mean RMS; rho = d sigmoid(b), or, with
    ``decay_shape="rms"``, d sigmoid(b) RMS/gsum with Krause's gsum, at most 1. c and d are
    ``rate_scale`` and ``decay_scale``, buffers that are set on validation text and not learned.
    With p = 1 and that decay shape this is Krause's rule (`from_krause`), with p = 0 it is gradient
    descent.

    a and b are one number a tensor, a row (the tensor's first dimension) or a coordinate, as
    ``granularity`` says; p and e are one number a tensor. Starting with ``decay=0`` leaves the
    decay out of the rule, and of what is learned.

    Args:
        rms: RMS of the training set's gradients, each ``[*shape]``.
        granularity: What has a rate and a decay of its own.
        rate: exp(a) at the start.
        decay: sigmoid(b) at the start, 0 <= decay < 1.
        exponent: p at the start.
        eps: eps at the start, **relative** to each tensor's mean RMS, > 0.
        decay_shape: Whether rho is the same for all coordinates or shaped like the RMS.

    Raises:
        ValueError: A number outside these ranges, or statistics that are not finite.
    """

    rate_scale: Tensor
    decay_scale: Tensor

    def __init__(
        self,
        rms: Mapping[str, Tensor],
        granularity: Granularity = "tensor",
        rate: float = 1e-3,
        decay: float = 1e-3,
        exponent: float = 0.5,
        eps: float = 1.0,
        decay_shape: DecayShape = "uniform",
    ) -> None:
        super().__init__()
        _check(granularity, rate, decay, eps, decay_shape)
        self.granularity = granularity
        self.decay_shape = decay_shape
        self.has_decay = decay > 0.0
        self.names = tuple(rms)
        relative = relative_rms(rms)
        for name, tensor in rms.items():
            tensor = tensor.detach().clone()
            own = tensor.new_zeros(_own_shape(granularity, tensor))
            self.register_buffer(f"rms/{key(name)}", tensor)
            self._learn("log_rate", name, own + math.log(rate))
            self._learn("exponent", name, tensor.new_tensor(exponent))
            self._learn("log_eps", name, tensor.new_tensor(math.log(eps)))
            if self.has_decay:
                start = min(decay, _LARGEST_DECAY)
                self._learn("decay_logit", name, own + math.log(start / (1 - start)))
            if self.has_decay and decay_shape == "rms":
                self.register_buffer(f"relative_rms/{key(name)}", relative[name].detach())
        one = next(iter(rms.values())).new_tensor(1.0)
        self.register_buffer("rate_scale", one)
        self.register_buffer("decay_scale", one.clone())

    @classmethod
    def from_krause(
        cls,
        rms: Mapping[str, Tensor],
        rate: float,
        decay: float,
        eps: float,
        granularity: Granularity = "tensor",
    ) -> LearnedRates:
        """The member of the family that is `RmsDecay` with these numbers (eps in units of RMS)."""
        _check(granularity, rate, decay, eps, "rms")
        rule = cls(rms, granularity, rate, decay, exponent=1.0, eps=1.0, decay_shape="rms")
        with torch.no_grad():
            for name, mean in _mean_rms(rms).items():
                rule.learned("log_eps", name).copy_((eps / mean).log())
        return rule

    def _learn(self, kind: str, name: str, value: Tensor) -> None:
        self.register_parameter(f"{kind}/{key(name)}", nn.Parameter(value))

    def learned(self, kind: str, name: str) -> Tensor:
        """One of ``log_rate``, ``exponent``, ``log_eps``, ``decay_logit`` of a fast tensor."""
        # Not get_parameter, which refuses the tensors that functional_call puts in their place.
        tensor: Tensor = getattr(self, f"{kind}/{key(name)}")
        return tensor

    def rms(self) -> Parameters:
        """RMS of the training set's gradients, each ``[*shape]``."""
        return {name: self.get_buffer(f"rms/{key(name)}") for name in self.names}

    def scales(self) -> Parameters:
        """RMS + eps of every coordinate, each ``[*shape]``, differentiable to eps."""
        rms, eps = self.rms(), self._eps()
        return {name: rms[name] + eps[name] for name in self.names}

    def _eps(self) -> Parameters:
        means = _mean_rms(self.rms())
        return {name: self.learned("log_eps", name).exp() * means[name] for name in self.names}

    def coefficients(self) -> StepSizes:
        """Rates c exp(a) (RMS + eps)^(-p) and decays rho, differentiable to a, p, eps and rho."""
        rms, eps = self.rms(), self._eps()
        rates: Parameters = {}
        decays: dict[str, Tensor | None] = {}
        for name in self.names:
            factor = self.rate_scale * self.learned("log_rate", name).exp()
            rates[name] = scaled_power(rms[name], eps[name], self.learned("exponent", name), factor)
            decays[name] = None
            if self.has_decay:
                decay = self.learned("decay_logit", name).sigmoid() * self.decay_scale
                if self.decay_shape == "rms":
                    decay = decay * self.get_buffer(f"relative_rms/{key(name)}")
                decays[name] = decay.clamp(max=1.0)
        return StepSizes(rates, decays)


def _own_shape(granularity: Granularity, tensor: Tensor) -> tuple[int, ...]:
    """Shape of what has one number a tensor, a row or a coordinate; broadcasts to the tensor."""
    if granularity == "coordinate":
        return tuple(tensor.shape)
    if granularity == "row" and tensor.dim() > 0:
        return (tensor.shape[0], *(1,) * (tensor.dim() - 1))
    return ()


def _mean_rms(rms: Mapping[str, Tensor]) -> Parameters:
    """Mean RMS of each tensor; of all tensors for one that never had a gradient."""
    means = {name: tensor.mean() for name, tensor in rms.items()}
    overall = torch.stack([*means.values()]).mean()
    return {name: torch.where(mean > 0, mean, overall) for name, mean in means.items()}


def _check(granularity: str, rate: float, decay: float, eps: float, decay_shape: str) -> None:
    if granularity not in ("tensor", "row", "coordinate"):
        raise ValueError(
            "unknown granularity; expected 'tensor', 'row' or 'coordinate', found "
            f"{granularity!r}; do change it"
        )
    if decay_shape not in ("uniform", "rms"):
        raise ValueError(
            f"unknown decay shape; expected 'uniform' or 'rms', found {decay_shape!r}; do change it"
        )
    for label, value in (("rate", rate), ("eps", eps)):
        if not 0.0 < value < math.inf:
            raise ValueError(
                f"impossible {label}; expected a finite number > 0, found {value}; do change it"
            )
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"impossible decay; expected 0 <= decay < 1, found {decay}; do change it")
