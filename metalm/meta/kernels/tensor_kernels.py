"""The loops of the step W <- W - s g + rho (W_0 - W) in tensor operations, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.meta.kernels.step_gradients import StepGradients, Steps, TraceSums, Wanted


def write_step(
    new: Tensor, weight: Tensor, gradient: Tensor, slow: Tensor, rate: Tensor, decay: Tensor | None
) -> None:
    """W - s g + rho (W_0 - W) into ``new``, which may be ``weight``.

    Args:
        new: ``[*shape]`` or ``[rows, *shape]``, written.
        weight: W, like ``new``.
        gradient: g, like ``new``.
        slow: W_0, ``[*shape]``.
        rate: s, broadcastable to ``[*shape]``.
        decay: rho, broadcastable to ``[*shape]``; None for no decay.
    """
    if decay is not None:
        weight = torch.lerp(weight, slow.expand_as(weight), decay, out=new)
    torch.addcmul(weight, rate, gradient, value=-1, out=new)


def sweep(steps: Steps, incoming: Tensor | None, wanted: Wanted) -> StepGradients:
    """Go back through the steps (equations in `step_gradients.py`).

    Args:
        steps: what was done.
        incoming: lambda_K, the gradient of the last W; None for zeros.
        wanted: what is asked for.
    """
    slow, like = steps.slow, steps.gradients[0]
    keep = 1.0 if steps.decay is None else 1 - steps.decay
    lambda_ = torch.zeros_like(like) if incoming is None else incoming
    mu = torch.zeros_like(like)
    lambda_gradient, lambda_sum, mu_gradient = (torch.zeros_like(slow) for _ in range(3))
    for gradient, weight in zip(reversed(steps.gradients), reversed(steps.weights), strict=True):
        lambda_gradient += _over_rows(lambda_ * gradient, slow)
        lambda_sum += _over_rows(lambda_, slow)
        mu_gradient += _over_rows(mu * gradient, slow)
        mu = lambda_ + keep * mu
        lambda_ = weight * gradient + keep * lambda_
    to_slow = lambda_sum * (1 - keep)
    if steps.truncated:
        to_slow += _over_rows(lambda_, slow)
    to_decay = mu_gradient * steps.rate
    if steps.start is not None:
        to_decay -= _over_rows(mu * (steps.start - slow), slow)
    return StepGradients(
        lambda_ if wanted.first else None,
        to_slow if wanted.slow else None,
        -lambda_gradient if wanted.rate else None,
        to_decay if wanted.decay else None,
    )


def write_traced_step(
    weight: Tensor,
    gradient: Tensor,
    slow: Tensor,
    rate: Tensor,
    decay: Tensor | None,
    trace: Tensor | None,
    sums: TraceSums,
    share: float,
) -> None:
    """Add w g D, w g T and w g to the sums; then T <- (1 - rho) T - D, and the step, in place.

    Args:
        weight: W, ``[*shape]`` or ``[rows, *shape]``; D = W - W_0.
        gradient: g, like ``weight``.
        slow: W_0, ``[*shape]``.
        rate: s, broadcastable to ``[*shape]``.
        decay: rho, broadcastable to ``[*shape]``; None for no decay.
        trace: T, like ``weight``; None where it is not asked for.
        sums: Where to add, over rows.
        share: w of this step.
    """
    away = weight - slow
    if sums.rate is not None:
        sums.rate.add_(_over_rows(gradient * away, slow), alpha=share)
    if sums.decay is not None and trace is not None:
        sums.decay.add_(_over_rows(gradient * trace, slow), alpha=share)
    if sums.slow is not None:
        sums.slow.add_(_over_rows(gradient, slow), alpha=share)
    if trace is not None:
        trace.sub_(away if decay is None else away + trace * decay)
    write_step(weight, weight, gradient, slow, rate, decay)


def _over_rows(tensor: Tensor, slow: Tensor) -> Tensor:
    return tensor if tensor.dim() == slow.dim() else tensor.sum(0)
