"""Penalties on the activations of the last layer, AR and TAR.

Merity, McCann, Socher 2017, "Revisiting activation regularization for language RNNs", as AWD-LSTM
takes them (Merity, Keskar, Socher 2018, section 4):

    AR = alpha mean((m * h_t)^2)        TAR = beta mean((h_t - h_{t+1})^2)

m is the dropout mask: AR sees what the softmax sees, TAR the output before dropout. The papers
write the norm L2; the published code, which gave their figures, takes the mean of squares.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activation_penalty(dropped: Tensor, alpha: float) -> Tensor:
    """AR, scalar: keeps activations small.

    Args:
        dropped: [time, rows, size], the last layer's output after dropout.
        alpha: its weight.
    """
    return alpha * _mean_square(dropped)


def slowness_penalty(features: Tensor, beta: float) -> Tensor:
    """TAR, scalar: keeps activations slow; 0 for a single step.

    Args:
        features: [time, rows, size], the last layer's output before dropout.
        beta: its weight.
    """
    if len(features) < 2:
        return features.new_zeros(())
    return beta * _mean_square(features[1:] - features[:-1])


def _mean_square(values: Tensor) -> Tensor:
    """In float32 at least, whatever the layers computed in."""
    reduced = values.dtype in (torch.bfloat16, torch.float16)
    return (values.float() if reduced else values).square().mean()
