"""What a model says of the token that follows each input, and how it is asked.

Training wants the loss of the targets, as fast as it can be had. Reading wants it so that nothing
but the past of its own row can have touched a bit of it. Whoever needs the whole distribution asks
for logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from metalm.adapt.token_losses import token_nats


class AbstractPrediction(ABC):
    """The distribution of the next token, at every time step of every row."""

    @property
    @abstractmethod
    def logits(self) -> Tensor:
        """[time, rows, vocabulary]: their softmax is the distribution."""

    @abstractmethod
    def nats(self, targets: Tensor) -> Tensor:
        """Minus log probability of each target, [time, rows], in nats and at least float32.

        Args:
            targets: int64 [time, rows].
        """

    @abstractmethod
    def scores(self, targets: Tensor) -> Tensor:
        """The same, for reading: what comes later, or in other rows, changes no bit of a number.

        Where logits are not finite the model has said nothing, and the uniform distribution speaks
        for it: the choice does not look at the target.

        Args:
            targets: int64 [time, rows].
        """


class FullPrediction(AbstractPrediction):
    """One softmax over the vocabulary.

    Args:
        logits: [time, rows, vocabulary].
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @property
    def logits(self) -> Tensor:  # noqa: D102 - of the interface
        return self._logits

    def nats(self, targets: Tensor) -> Tensor:  # noqa: D102 - of the interface
        return cross_entropy(self._logits, targets)

    def scores(self, targets: Tensor) -> Tensor:  # noqa: D102 - of the interface
        return token_nats(self._logits, targets, is_finite(self._logits))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus log probability of each target, [time, rows], in nats and at least float32."""
    nats = torch.nn.functional.cross_entropy(
        at_least_float32(logits).flatten(0, 1), targets.flatten(), reduction="none"
    )
    return nats.view_as(targets)


def is_finite(logits: Tensor) -> Tensor:
    """Where all logits are finite, bool [time, rows].

    Every word can come in the models of this package, so that one of minus infinity says no less
    than nan that the weights have blown up.
    """
    return at_least_float32(logits.detach()).sum(-1).isfinite()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The same in float32 if it is shorter."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
