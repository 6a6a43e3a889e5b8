"""What rules make of the gradient statistics of the training set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metalm.meta.parameters import Parameters


def relative_rms(rms: Mapping[str, Tensor]) -> Parameters:
    """RMS over the unweighted mean, over tensors, of each tensor's mean (Krause's ``decrate``).

    Raises:
        ValueError: A statistic that is negative or not finite, or all of them zero.
    """
    for name, tensor in rms.items():
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError(
                f"bad gradient statistics of {name!r}; expected finite numbers >= 0, found "
                f"{float(tensor.min())} to {float(tensor.max())}; do collect them again"
            )
    if not any(bool((tensor > 0).any()) for tensor in rms.values()):
        raise ValueError(
            "gradient statistics are all zero; expected the RMS of training gradients, found "
            f"{len(rms)} tensors of zeros; do collect them on the training set"
        )
    mean = mean_over_tensors(rms)
    return {name: tensor / mean for name, tensor in rms.items()}


def mean_over_tensors(rms: Mapping[str, Tensor]) -> Tensor:
    """Krause's ``gsum``: the unweighted mean over tensors of the mean of each."""
    return torch.stack([tensor.mean() for tensor in rms.values()]).mean()


def key(name: str) -> str:
    """A parameter's name as a module can register it, which takes no dots."""
    return name.replace(".", "/")
