"""What a backward sweep over steps W <- W - s g + rho (W_0 - W) is asked for, and what it gives.

With keep = 1 - rho, per coordinate and row, for steps t = 0 .. K-1 with loss weights w_t:

    lambda_t = w_t g_t + keep lambda_{t+1}              dJ/dW_t
    mu_t     = lambda_{t+1} + keep mu_{t+1}             sum over u >= t of keep^(u-t) lambda_{u+1}
    dJ/ds    = - sum_t lambda_{t+1} g_t
    dJ/dW_0  = rho sum_t lambda_{t+1}                   (and lambda_0, where W_first - W_0 is held)
    dJ/drho  = sum_t lambda_{t+1} (W_0 - W_t) = s sum_t mu_{t+1} g_t - mu_0 (W_first - W_0)

The last follows from W_t - W_0 = keep^t (W_first - W_0) - sum over u < t of keep^(t-1-u) s g_u.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Wanted(NamedTuple):
    """Which gradients a sweep is asked for."""

    first: bool
    slow: bool
    rate: bool
    decay: bool


class Steps(NamedTuple):
    """The steps of one fast tensor; what all rows share is ``[*shape]``."""

    gradients: list[Tensor]
    """g_t of every step, ``[*shape]`` or ``[rows, *shape]``."""
    weights: list[float]
    """w_t of every step."""
    slow: Tensor
    """W_0."""
    rate: Tensor
    """s, broadcastable to ``[*shape]``."""
    decay: Tensor | None
    """rho, broadcastable to ``[*shape]``; None for no decay."""
    start: Tensor | None
    """The first W, like g; None where it is W_0 or dJ/drho is not asked for."""
    truncated: bool
    """Whether W_first - W_0 is held constant, so that lambda_0 belongs to dJ/dW_0."""


class StepGradients(NamedTuple):
    """The gradients asked for, the others None."""

    first: Tensor | None
    """lambda_0, like g."""
    slow: Tensor | None
    """dJ/dW_0, ``[*shape]``."""
    rate: Tensor | None
    """dJ/ds of each coordinate, ``[*shape]``."""
    decay: Tensor | None
    """dJ/drho of each coordinate, ``[*shape]``."""

    def of_shapes(
        self, rate: Tensor, decay: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (W_0, s, rho), the latter summed to the shapes of s and rho."""
        to_rate = None if self.rate is None else self.rate.sum_to_size(rate.shape)
        if self.decay is None or decay is None:
            return self.slow, to_rate, None
        return self.slow, to_rate, self.decay.sum_to_size(decay.shape)


class TraceSums(NamedTuple):
    """Sums over steps and rows in forward mode, each ``[*shape]``, None where not asked for."""

    rate: Tensor | None
    """sum w_t g_t (W_t - W_0)."""
    decay: Tensor | None
    """sum w_t g_t T_t."""
    slow: Tensor | None
    """sum w_t g_t."""
