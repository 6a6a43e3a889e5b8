"""ANIL: MAML whose inner steps move the head alone (Raghu et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from metalm.fewshot.adaptation import Adaptation, Batch, task_loss
from metalm.meta.module_fork import ForkUnrolled, fork
from metalm.meta.rules import GradientDescent


class Anil(Adaptation):
    """Features from the ``body``, computed once a task; the ``head`` takes the steps of MAML.

    arXiv 1909.09157, section 4. The body is meta-learned through the queries, and at order 2 also
    through the steps of the head.

    Args:
        network: with the modules ``body`` and ``head``, whose answer is ``head(body(inputs))``.
        rate: of the inner steps, on the mean loss of the support items.
        **options: see `Adaptation`.

    Raises:
        ValueError: the network has no such modules.
    """

    def __init__(self, network: nn.Module, *, rate: float, **options: Any) -> None:
        super().__init__(network, **options)
        body, head = (getattr(network, name, None) for name in ("body", "head"))
        if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
            names = ", ".join(name for name, _ in network.named_children())
            raise ValueError(
                "the network has no parts for ANIL; expected modules 'body' and 'head', found "
                f"{names or 'none'}; do use such a network"
            )
        self.rule = GradientDescent(rate)
        self._body, self._head = [body], [head]  # in lists, or they would be registered twice

    def learn(self, tasks: int | None, batches: Sequence[Batch]) -> ForkUnrolled:
        """Steps of the head on features, and the loss of the queries."""
        body = fork(self._body[0], (), tasks=tasks)
        *steps, (query, query_targets) = batches
        learnt = fork(self._head[0], tasks=tasks)
        if steps:
            inputs, targets = steps[0]
            features = body(inputs)
            if self.order < 2:
                features = features.detach()
            learnt = learnt.unroll(
                self.rule, [(features, targets)] * len(steps), task_loss, order=self.order
            ).fork
        done = learnt.unroll(
            self.rule, [(body(query), query_targets)], task_loss, update_last=False
        )
        return done._replace(fork=body)

    def start(self, tasks: int | None) -> Any:
        """W_0, of which the head alone learns in use."""
        return fork(self.network, ["head.*"], tasks=tasks)

    def keep_statistics(self, module: nn.Module, buffers: dict[str, Tensor]) -> None:
        """Those of the body."""
        del module
        super().keep_statistics(self._body[0], buffers)
