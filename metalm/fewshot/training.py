"""Meta-training: one step of the outer optimiser on the mean meta-loss of a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.tasks.episodes import EpisodeSource
from metalm.training.state import pack, unpack


class FewShotTraining:
    """Draws tasks, takes the method's meta-gradient and a step of the optimiser; can be resumed.

    A step whose meta-gradient, or whose buffers after it (running statistics, moments), are not
    finite is skipped and counted: method and optimiser stay as they were before it.

    Args:
        method: trained in place.
        source: where tasks come from; its generator is part of the state.
        optimizer: of the method's parameters.
        tasks: in a batch.
        schedule: the learning rate at step `index`.
        clip: highest norm of the meta-gradient; 0 for none.
        device: where the tasks go.
    """

    def __init__(
        self,
        method: FewShotMethod,
        source: EpisodeSource,
        optimizer: torch.optim.Optimizer,
        *,
        tasks: int,
        schedule: Callable[[int], float],
        clip: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.method, self.source, self.optimizer = method, source, optimizer
        self.tasks, self.schedule, self.clip, self.device = tasks, schedule, clip, device

    def step(self, index: int) -> dict[str, float]:
        """One batch of tasks; returns "loss" (meta-loss), "score" (see `MetaStep`), "skipped"."""
        self.method.train()
        episode = self.source.sample(self.tasks).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.method.buffers()]
        measured = self.method.meta_gradient(episode)
        norm = torch.nn.utils.clip_grad_norm_(
            self.method.parameters(), self.clip if self.clip > 0 else torch.inf
        )
        if not self._finite(norm):
            self._put_back(before)
            return {"loss": measured.loss, "score": measured.score, "skipped": 1.0}
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(index)
        self.optimizer.step()
        return {"loss": measured.loss, "score": measured.score, "skipped": 0.0}

    def _finite(self, norm: Tensor) -> bool:
        """Whether the meta-gradient of this norm, a scalar, and all buffers are finite."""
        numbers = [norm, *self.method.buffers()]
        return bool(torch.stack([each.isfinite().all() for each in numbers]).all())

    def _put_back(self, buffers: Sequence[Tensor]) -> None:
        for buffer, before in zip(self.method.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Method, optimiser, and where the tasks stand."""
        return pack(
            {
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "source": self.source.state_dict(),
            }
        )

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        tree = unpack(tensors, meta)
        self.method.load_state_dict(tree["method"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.source.load_state_dict(tree["source"])
