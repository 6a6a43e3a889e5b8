"""What the optimization methods share: a network that learns each task by inner updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.fewshot.methods.method import FewShotMethod, MetaStep, evaluation
from metalm.fewshot.methods.step_weights import CountedStep, counting_queries, share_of_each_step
from metalm.fewshot.tasks.episodes import Episode
from metalm.meta.module_fork import Fork, ForkUnrolled, fork
from metalm.meta.segment_length import Segment
from metalm.meta.tasks import backward_over_tasks
from metalm.meta.update_rule import AbstractUpdateRule, RuleState

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

Queries = Literal["together", "alone"]
"""Whether the queries of a task are answered together, or each with the support set alone."""


def task_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss of a task's items, and their score.

    Cross-entropy in nats and the share of right answers where targets are classes; the mean squared
    error twice where they are numbers. Losses are taken in float32 at least.
    """
    inputs, targets = batch
    outputs = model(inputs)
    if outputs.dtype == torch.bfloat16:
        outputs = outputs.float()
    if targets.is_floating_point():
        loss = functional.mse_loss(outputs, targets)
        return loss, loss.detach().clone()
    right = (outputs.argmax(-1) == targets).to(outputs.dtype)
    return functional.cross_entropy(outputs, targets), right.mean()


class Adaptation(FewShotMethod):
    """Learns a task by ``steps`` updates on its support set, and answers with what came of it.

    With running statistics, tasks are normalised by their batches in meta-training, each with
    averages of its own; the network's averages become their mean over the tasks. In use, the
    network's averages normalise everything.

    Args:
        network: W_0.
        steps: updates in meta-training.
        test_steps: updates in use; as many by default.
        order: of the meta-gradient.
        together: tasks that are learnt side by side; None for all. It changes no result.
        segment: for less memory; see `metalm.meta.unroll.unroll`.
        queries: "together", or "alone", so that batch statistics come from the support set and one
            query (not transductive; Nichol et al. 2018, section 6.1). It matters for networks with
            transductive statistics.
        step_weights: what the query loss after each update weighs in the meta-loss; none for that
            after the last alone (see `metalm.fewshot.methods.step_weights`).

    Raises:
        ValueError: a number of steps that is impossible, another word for the queries, or step
            weights that do not fit the steps or the method.
    """

    rule: AbstractUpdateRule

    def __init__(
        self,
        network: nn.Module,
        *,
        steps: int,
        test_steps: int | None = None,
        order: int = 2,
        together: int | None = 1,
        segment: Segment | None = None,
        queries: Queries = "together",
        step_weights: Sequence[float] = (),
    ) -> None:
        super().__init__()
        test_steps = steps if test_steps is None else test_steps
        if steps < 0 or test_steps < 0:
            raise ValueError(
                "impossible number of updates; expected at least 0, found "
                f"{steps} in training and {test_steps} in use; do change it"
            )
        if queries not in ("together", "alone"):
            raise ValueError(
                f"unknown way to answer; expected 'together' or 'alone', found {queries!r}; do "
                "choose one"
            )
        if step_weights and (order == 0 or steps == 0):
            raise ValueError(
                "step weights weigh the query losses after the updates of meta-training; expected "
                f"none for {type(self).__name__}, which has no such losses, found "
                f"{len(step_weights)}; do leave them out"
            )
        self.shares = share_of_each_step(step_weights, steps)
        self.network = network
        self.steps, self.test_steps, self.order = steps, test_steps, order
        self.together, self.segment, self.queries = together, segment, queries
        own = getattr(network, "statistics", "none")
        self.statistics = "support" if own == "transductive" and queries == "alone" else own

    def learn(self, tasks: int | None, batches: Sequence[Batch]) -> ForkUnrolled:
        """The unroll of so many tasks, whose meta-loss is that of the queries.

        Args:
            tasks: None for one, without a dimension for it.
            batches: the support set once for each step; the queries, which are only scored.

        Returns:
            Its losses, and what they keep, are those of the queries where they count.
        """
        *supports, query = batches
        done = fork(self.network, tasks=tasks).unroll(
            self.rule,
            [
                CountedStep(support, query) if share else support
                for support, share in zip(supports, self.shares[:-1], strict=True)
            ]
            + [query],
            counting_queries(task_loss),
            weights=self.shares,
            order=self.order,
            segment=self.segment,
            update_last=False,
            apart=any(self.shares[:-1]),
        )
        counted = [step for step, share in enumerate(self.shares) if share]
        return done._replace(losses=done.losses[counted], aux=[done.aux[i] for i in counted])

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """Updates on the support set, and the gradient of the query loss through them."""
        support = (episode.support_inputs, episode.support_targets)
        query = (episode.query_inputs, episode.query_targets)
        done = backward_over_tasks([*[support] * self.steps, query], self.learn, self.together)
        self.keep_statistics(self.network, done.buffers)
        counted = [share for share in self.shares if share]
        losses = [losses.mean().item() for losses in done.losses]
        loss = sum(share * own for share, own in zip(counted, losses, strict=True))
        return MetaStep(loss, done.aux[-1].mean().item())

    def predict(
        self, support_inputs: Tensor, support_targets: Tensor, query_inputs: Tensor
    ) -> Tensor:
        """Answers after ``test_steps`` updates; see `FewShotMethod.predict`."""
        steps = [self.test_steps]
        return self.answers_after(steps, support_inputs, support_targets, query_inputs)[0]

    @torch.no_grad()
    def answers_after(
        self, steps: Sequence[int], support_inputs: Tensor, support_targets: Tensor, query: Tensor
    ) -> Tensor:
        """What is answered after each of these numbers of updates.

        Args:
            steps: numbers of updates, ascending.
            support_inputs: ``[tasks, items, ...]``.
            support_targets: ``[tasks, items]``, or values.
            query: ``[tasks, queries, ...]``.

        Returns:
            ``[len(steps), tasks, queries, ...]``.
        """
        width = len(query) if self.together is None else self.together
        inputs, targets = support_inputs, support_targets
        with evaluation(self):
            if width == 1:
                alone = zip(inputs, targets, query, strict=True)
                return torch.stack([self._answers(None, steps, (x, y), q) for x, y, q in alone], 1)
            parts = zip(*(each.split(width) for each in (inputs, targets, query)), strict=True)
            return torch.cat([self._answers(len(q), steps, (x, y), q) for x, y, q in parts], 1)

    def _answers(
        self, tasks: int | None, steps: Sequence[int], support: Batch, query: Tensor
    ) -> Tensor:
        """The same of tasks that are taken side by side, or of one without a dimension for it."""
        model = self.start(tasks)
        state = self.first_state(tasks)
        taken = 0
        answers = []
        batches = self.support_batches(support, max(steps))
        for wanted in steps:
            if wanted > taken:
                done = model.unroll(
                    self.rule, batches[taken:wanted], task_loss, order=0, rule_state=state
                )
                model, state, taken = done.fork, done.rule_state, wanted
            answers.append(self._answer(model, support[0], query))
        return torch.stack(answers)

    def start(self, tasks: int | None) -> Fork:
        """W_0 as the fork that learns a task in use."""
        return fork(self.network, tasks=tasks)

    def first_state(self, tasks: int | None) -> RuleState:
        """The rule's state when a task in use begins; None for its initial one."""
        del tasks
        return None

    def support_batches(self, support: Batch, steps: int) -> list[Batch]:
        """What each update learns from; the whole support set."""
        return [support] * steps

    def _answer(self, model: Fork, support: Tensor, query: Tensor) -> Tensor:
        if self.statistics != "support":
            return model(query)
        dim = 0 if model.tasks is None else 1

        def one(item: Tensor) -> Tensor:
            return model(torch.cat([support, item.unsqueeze(dim)], dim)).select(dim, -1)

        return torch.stack([one(item) for item in query.unbind(dim)], dim)

    def keep_statistics(self, module: nn.Module, buffers: dict[str, Tensor]) -> None:
        """Running averages of the tasks ``[tasks, ...]`` become, in their mean, the network's."""
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(buffers[name].mean(0))
                else:
                    buffer.copy_(buffers[name].amax(0))
