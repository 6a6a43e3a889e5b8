"""RMS dynamic evaluation with decay to the slow weights, exactly as Krause et al. run it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from metalm.meta.rules.statistics import key, relative_rms
from metalm.meta.step_rule import AbstractStepRule, StepSizes


class RmsDecay(AbstractStepRule):
    """W <- W + min(decay MS/gsum, 1) (W_0 - W) - rate g / (MS + eps), nothing learned.

    MS is the RMS of the training set's gradients, coordinate by coordinate, and gsum the unweighted
    mean over tensors of the mean of each (``benkrause/dynamic-evaluation:dynamiceval.py``).

    Args:
        rms: MS of every fast tensor, ``[*shape]``.
        rate: Krause's eta, >= 0.
        decay: Krause's lambda, >= 0.
        eps: In the units of MS, >= 0.

    Raises:
        ValueError: A negative number, bad statistics, or MS + eps = 0 somewhere.
    """

    def __init__(self, rms: Mapping[str, Tensor], rate: float, decay: float, eps: float) -> None:
        super().__init__()
        for label, value in (("rate", rate), ("decay", decay), ("eps", eps)):
            if not value >= 0.0:
                raise ValueError(f"impossible {label}; expected >= 0, found {value}; do change it")
        self.names = tuple(rms)
        self.has_decay = decay > 0.0
        relative = relative_rms(rms)
        for name, tensor in rms.items():
            if eps == 0.0 and not bool((tensor > 0).all()):
                raise ValueError(
                    f"zeros in the gradient statistics of {name!r}; expected eps > 0 with them, "
                    "found eps = 0; do raise eps"
                )
            self.register_buffer(f"rate/{key(name)}", rate / (tensor + eps))
            if self.has_decay:
                self.register_buffer(f"decay/{key(name)}", (decay * relative[name]).clamp(max=1.0))

    def coefficients(self) -> StepSizes:
        """The two buffers of every tensor."""
        rates = {name: self.get_buffer(f"rate/{key(name)}") for name in self.names}
        decays: dict[str, Tensor | None] = dict.fromkeys(self.names)
        if self.has_decay:
            decays |= {name: self.get_buffer(f"decay/{key(name)}") for name in self.names}
        return StepSizes(rates, decays)
