"""ANIL: MAML whose inner steps move the head alone (Raghu et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metalm.fewshot.methods.adaptation import Adaptation, Batch, task_loss
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
        """Steps of the head on features, and the losses of the queries where they count."""
        body = fork(self._body[0], (), tasks=tasks)
        *steps, (query, query_targets) = batches
        learnt = fork(self._head[0], tasks=tasks)
        support = []
        if steps:
            inputs, targets = steps[0]
            features = body(inputs)
            if self.order < 2:
                features = features.detach()
            support = [(features, targets)]
        queries = [(body(query), query_targets)]
        counted, taken = [], 0
        for step, share in enumerate(self.shares):
            if not share:
                continue
            if step > taken:
                learnt = learnt.unroll(
                    self.rule, support * (step - taken), task_loss, order=self.order
                ).fork
                taken = step
            counted.append(
                learnt.unroll(self.rule, queries, task_loss, weights=[share], update_last=False)
            )
        return ForkUnrolled(
            body,
            torch.stack([each.meta_loss for each in counted]).sum(),
            torch.cat([each.losses for each in counted]),
            [kept for each in counted for kept in each.aux],
            None,
        )

    def start(self, tasks: int | None) -> Any:
        """W_0, of which the head alone learns in use."""
        return fork(self.network, ["head.*"], tasks=tasks)

    def keep_statistics(self, module: nn.Module, buffers: dict[str, Tensor]) -> None:
        """Those of the body."""
        del module
        super().keep_statistics(self._body[0], buffers)
