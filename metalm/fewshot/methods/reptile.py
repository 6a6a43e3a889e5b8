"""Reptile: towards the weights that each task was learnt with (Nichol et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metalm.fewshot.methods.adaptation import Adaptation, Batch, task_loss
from metalm.fewshot.methods.method import MetaStep
from metalm.fewshot.tasks.episodes import Episode
from metalm.meta.module_fork import fork
from metalm.meta.rules import Adam, GradientDescent
from metalm.meta.rules.adam import AdamState
from metalm.meta.tree import detach
from metalm.training.precision import reduced_products

# Minibatches in use are the same for every task, whatever was drawn before.
_SEED = 0


class Reptile(Adaptation):
    """W_0 <- W_0 + e (mean over tasks of W_steps - W_0); no derivative of the inner steps is taken.

    arXiv 1803.02999, algorithms 1 and 2. The meta-gradient is W_0 - W_steps, so that gradient
    descent at the rate e makes the step; with one task in a batch this is the serial version, with
    several the batched one. Tasks are learnt one after the other.

    Args:
        network: W_0.
        rate: of the inner steps.
        batch: items of an inner minibatch, drawn without replacement until all were seen; None for
            the whole support set.
        test_batch: the same in use.
        adam: whether the inner steps are Adam's without momentum, as the authors' for pictures,
            or gradient descent, as theirs for sine curves. Adam's second moments go on from task to
            task, as in their code, and begin a task in use.
        **options: see `Adaptation`; the order plays no part.

    Raises:
        ValueError: no update, or an empty minibatch.
    """

    seen: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        rate: float,
        batch: int | None = None,
        test_batch: int | None = None,
        adam: bool = False,
        bfloat16: bool = False,
        **options: Any,
    ) -> None:
        if bfloat16:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(network, order=0, **options)
        refuse_no_steps(self.steps)
        self.reduced = bfloat16
        for size in (batch, test_batch):
            if size is not None and size < 1:
                raise ValueError(
                    f"impossible minibatch; expected at least 1 item, found {size}; do change it"
                )
        self.batch, self.test_batch = batch, test_batch
        self.rule = Adam(rate, (0.0, 0.999)) if adam else GradientDescent(rate)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._second = [f"second/{name.replace('.', '/')}" for name, _ in self._learning()]
        for place, (_, tensor) in zip(self._second, self._learning(), strict=True):
            self.register_buffer(place, torch.zeros_like(tensor.detach()) if adam else None)

    def meta_gradient(self, episode: Episode) -> MetaStep:
        """Learns every task in turn; the distance gone, with its sign turned, is the gradient."""
        losses, scores, buffers = [], [], []
        tasks = len(episode.support_inputs)
        for x, y, query, wanted in zip(*episode, strict=True):
            model = fork(self.network)
            batches = _minibatches((x, y), self.batch, self.steps, None)
            state = self.first_state(None)
            done = model.unroll(self.rule, batches, self._training_loss, order=0, rule_state=state)
            self._remember(done.rule_state)
            with torch.no_grad():
                for name, slow in model.slow.items():
                    away = (slow - done.fork.fast[name]) / tasks
                    slow.grad = away if slow.grad is None else slow.grad + away
                kept = detach(done.fork.buffers)
                loss, score = task_loss(done.fork, (query, wanted))
            losses.append(loss)
            scores.append(score)
            buffers.append(kept)
        names = buffers[0]
        self.keep_statistics(
            self.network, {name: torch.stack([own[name] for own in buffers]) for name in names}
        )
        return MetaStep(torch.stack(losses).mean().item(), torch.stack(scores).mean().item())

    def support_batches(self, support: Batch, steps: int) -> list[Batch]:
        """Minibatches; the same draw for every task."""
        return _minibatches(support, self.test_batch, steps, torch.Generator().manual_seed(_SEED))

    def first_state(self, tasks: int | None) -> AdamState | None:
        """Adam's, as the tasks before left it."""
        if not isinstance(self.rule, Adam):
            return None
        own = {
            name: getattr(self, place)
            for place, (name, _) in zip(self._second, self._learning(), strict=True)
        }
        if tasks is not None:
            own = {name: tensor.expand(tasks, *tensor.shape) for name, tensor in own.items()}
        return AdamState({n: torch.zeros_like(t) for n, t in own.items()}, own, int(self.seen))

    def _training_loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        if not self.reduced or inputs.dim() != 4:
            return task_loss(model, batch)
        with reduced_products(inputs.device, self.reduced):
            return task_loss(model, (_channels_last(inputs), targets))

    def _remember(self, state: AdamState | None) -> None:
        if state is not None:
            self.seen.fill_(state.steps)
            for place, tensor in zip(self._second, state.second.values(), strict=True):
                getattr(self, place).copy_(tensor)

    def _learning(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]


def refuse_no_steps(steps: int) -> None:
    """Checks that there is an update in meta-training.

    Raises:
        ValueError: there is none.
    """
    if steps < 1:
        raise ValueError(
            "Reptile goes where the updates of a task lead, and without one it learns nothing; "
            f"expected at least 1 update in training (adaptation.steps), found {steps}; do take "
            "more"
        )


def _channels_last(pictures: Tensor) -> Tensor:
    """The same, with channels last in memory; torch leaves a single channel where it is."""
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = pictures.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return pictures.as_strided(pictures.shape, strides)


def _minibatches(
    support: Batch, size: int | None, steps: int, generator: torch.Generator | None
) -> list[Batch]:
    """Items ``[items, ...]`` or ``[tasks, items, ...]`` in batches, shuffled at every pass."""
    inputs, targets = support
    if size is None:
        return [support] * steps
    dim = targets.dim() - (1 if not targets.is_floating_point() else 2)
    items = inputs.shape[dim]
    order: list[int] = []
    batches = []
    for _ in range(steps):
        while len(order) < min(size, items):
            order += torch.randperm(items, generator=generator).tolist()
        chosen = torch.tensor(order[:size], device=inputs.device)
        order = order[size:]
        batches.append((inputs.index_select(dim, chosen), targets.index_select(dim, chosen)))
    return batches
