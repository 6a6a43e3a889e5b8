"""Root mean square of the gradients over many batches, as dynamic evaluation uses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from metalm.meta.parameters import Parameters


class GradientStatistics:
    """Running sum of squared gradients: RMS = sqrt((1/B) sum over B batches of g^2).

    Krause et al. take g as the gradient of a batch's mean token loss, over the training set, in
    evaluation mode (lm: ``benkrause/dynamic-evaluation``, ``gradstat``).

    Example:
        >>> statistics = GradientStatistics([{"w": torch.tensor([3.0, 0.0])}])
        >>> statistics.add({"w": torch.tensor([1.0, 2.0])})
        >>> statistics.rms()["w"].square()
        tensor([5., 2.])
    """

    def __init__(self, gradients: Iterable[Mapping[str, Tensor]] = ()) -> None:
        self.num_batches = 0
        self._sums: Parameters = {}
        for gradient in gradients:
            self.add(gradient)

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Count one batch more.

        Args:
            gradients: The batch's gradient of each parameter, always of the same names.

        Raises:
            ValueError: The names differ from those of the batches before.
        """
        if self.num_batches == 0:
            self._sums = {name: torch.zeros_like(value) for name, value in gradients.items()}
        if gradients.keys() != self._sums.keys():
            raise ValueError(
                f"gradients of other parameters than before; expected {sorted(self._sums)}, "
                f"found {sorted(gradients)}; do give every batch the same parameters"
            )
        for name, total in self._sums.items():
            total.addcmul_(gradients[name], gradients[name])
        self.num_batches += 1

    @torch.no_grad()
    def rms(self) -> Parameters:
        """The root mean square of every coordinate, in the gradients' units.

        Raises:
            ValueError: No batch was counted.
        """
        if self.num_batches == 0:
            raise ValueError(
                "no gradient statistics; expected at least one batch, found 0; "
                "do check that the training text is not empty"
            )
        return {name: (total / self.num_batches).sqrt_() for name, total in self._sums.items()}
