"""NT-ASGD: SGD whose weights are averaged from where validation no longer improves.

Merity, Keskar, Socher 2018, section 3, algorithm 1: with validation losses v_1 ... v_t, one an
epoch, averaging begins at the first t > n + 1 at which

    v_t > min(v_1, ..., v_{t-n-1})

and the average of all weights since is what is evaluated from then on. The weights themselves go on
unchanged by it, at the same rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metalm.meta.parameters import Parameters


def is_non_monotone(earlier: Sequence[float], latest: float, interval: int) -> bool:
    """Whether a validation loss is no better than the best of those before the last `interval`.

    Args:
        earlier: losses of all epochs before, in order.
        latest: that of the epoch that has just ended.
        interval: n.
    """
    return len(earlier) > interval and latest > min(earlier[: len(earlier) - interval])


class NtAsgd:
    """Steps of SGD with weight decay (L2), the averages, and the weights that validated best.

    The average is over the weights after every step since the switch. `torch.optim.ASGD`, which the
    published code uses, leaves the first of them out, and takes each step at the rate of the window
    before it; neither is in the paper.

    Args:
        parameters: trained in place; their gradients are those of the step.
        learning_rate: of a window of mean length.
        weight_decay: L2, added to the gradient after clipping.
        interval: n.
    """

    def __init__(
        self, parameters: Parameters, *, learning_rate: float, weight_decay: float, interval: int
    ) -> None:
        self._parameters, self._rate, self._interval = parameters, learning_rate, interval
        self._optimizer = torch.optim.SGD(
            list(parameters.values()), lr=learning_rate, weight_decay=weight_decay
        )
        self._losses: list[float] = []
        self._averages: Parameters | None = None
        self._averaged = 0
        self._best: Parameters | None = None
        self._best_loss: float | None = None

    @torch.no_grad()
    def step(self, done: float, share: float) -> float:
        """One step; returns its learning rate.

        Args:
            done: epochs before it; without effect here.
            share: of the learning rate, which the window's length asks for.
        """
        del done
        rate = self._rate * share
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        if self._averages is not None:
            self._averaged += 1
            for name, average in self._averages.items():
                average.lerp_(self._parameters[name], 1 / self._averaged)
        return rate

    @property
    def weights(self) -> Parameters:
        """Those to evaluate: the averages, once there are any."""
        return self._parameters if self._averages is None else self._averages

    def end_epoch(self, loss: float) -> None:
        """Takes note of the validation loss of `weights`; may begin to average."""
        if self._best_loss is None or loss < self._best_loss:
            self._best_loss, self._best = loss, _copy(self.weights)
        if self._averages is None:
            if is_non_monotone(self._losses, loss, self._interval):
                self._averages = _copy(self._parameters)
            self._losses.append(loss)

    @property
    def result(self) -> Parameters:
        """The weights of lowest validation loss, of the evaluated ones."""
        return self.weights if self._best is None else self._best

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the weights."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "losses": self._losses,
            "averages": self._averages,
            "averaged": self._averaged,
            "best": self._best,
            "best_loss": self._best_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._losses = list(state["losses"])
        self._averages = self._like_own(state["averages"])
        self._averaged = state["averaged"]
        self._best = self._like_own(state["best"])
        self._best_loss = state["best_loss"]

    def _like_own(self, weights: Parameters | None) -> Parameters | None:
        if weights is None:
            return None
        return {name: weights[name].to(own.device) for name, own in self._parameters.items()}


def _copy(parameters: Parameters) -> Parameters:
    return {name: weight.detach().clone() for name, weight in parameters.items()}
