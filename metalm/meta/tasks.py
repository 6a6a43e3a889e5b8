"""The meta-gradient of several tasks: one by one, or side by side; the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.meta import tree
from metalm.meta.inner_problem import Batch
from metalm.meta.module_fork import ForkUnrolled


class TaskLosses(NamedTuple):
    """What several tasks leave behind, without history."""

    losses: Tensor
    """``[steps, tasks]``."""
    aux: list[Any]
    """What the losses gave to keep, by step, its tensors ``[tasks, ...]``."""
    buffers: dict[str, Tensor]
    """The buffers of every task after its last step, ``[tasks, ...]``."""


def backward_over_tasks(
    batches: Sequence[Batch],
    learn: Callable[[int | None, list[Batch]], ForkUnrolled],
    together: int | None = 1,
) -> TaskLosses:
    """Leave the gradient of the mean meta-loss in ``.grad``, a backward pass for each task.

        def learn(tasks, batches):
            return fork(module, tasks=tasks).unroll(rule, batches, loss, order=2)

        backward_over_tasks([support, support, query], learn, together=8)

    One by one, memory holds the graph of one task; side by side, that of as many as are taken
    together, in fewer and larger operations.

    Args:
        batches: one a step, every tensor ``[tasks, ...]``.
        learn: called with a number of tasks, or None for a single one, and their batches; gives the
            unroll whose meta-loss counts.
        together: how many tasks are taken side by side; None for all.

    Raises:
        ValueError: no task, batches of unequal numbers of tasks, or fewer than one together.
    """
    num = _count(batches)
    if together is not None and together < 1:
        raise ValueError(
            f"impossible number of tasks together; expected at least 1, found {together}; do "
            "change it"
        )
    width = num if together is None else together
    parts = []
    for start in range(0, num, width):
        count = min(width, num - start)
        alone = width == 1
        part = _part(list(batches), start if alone else slice(start, start + count))
        done = learn(None if alone else count, part)
        if done.meta_loss.requires_grad:
            (done.meta_loss / num).backward()
        parts.append(_finished(done, alone))
    return TaskLosses(
        torch.cat([part.losses for part in parts], 1),
        _together([part.aux for part in parts]),
        _together([part.buffers for part in parts]),
    )


def _finished(done: ForkUnrolled, alone: bool) -> TaskLosses:
    def own(tensor: Tensor) -> Tensor:
        return tensor.detach()[None] if alone else tensor.detach()

    losses = done.losses[:, None] if alone else done.losses
    return TaskLosses(losses, tree.transform(done.aux, own), tree.transform(done.fork.buffers, own))


def _together(trees: list[Any]) -> Any:
    """Trees of one form, their tensors joined along the first dimension."""
    columns = zip(*(tree.tensors(one) for one in trees), strict=True)
    return tree.replace(trees[0], [torch.cat(tensors) for tensors in columns])


def _part(batches: list[Batch], index: int | slice) -> list[Batch]:
    """The batches of some tasks; a batch that is used in several steps stays one."""
    known: dict[int, Batch] = {}
    for batch in batches:
        if id(batch) not in known:
            known[id(batch)] = tree.transform(batch, lambda tensor: tensor[index])
    return [known[id(batch)] for batch in batches]


def _count(batches: Sequence[Batch]) -> int:
    counts = {len(t) if t.dim() else 0 for t in tree.tensors(list(batches))}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "the batches do not fit together; expected the same number of tasks, at least 1, in "
            f"every tensor, found {sorted(counts) or 'no tensor'}; do give tensors [tasks, ...]"
        )
    return counts.pop()
