"""Episodes: N-way K-shot tasks drawn from labels alone.

A task has `way` classes, `shot` support pictures and `query` query pictures of each. The same seed
gives the same episodes, however many are drawn at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Episode(NamedTuple):
    """A batch of tasks; targets are long for classification and float for regression.

    Attributes:
        support_inputs: [tasks, way * shot, ...].
        support_targets: [tasks, way * shot], or [tasks, shot, outputs] for regression.
        query_inputs: [tasks, way * query, ...].
        query_targets: [tasks, way * query], or [tasks, query, outputs] for regression.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor

    def to(self, device: torch.device | str) -> Episode:
        """The same episode on another device."""
        return Episode(*(tensor.to(device) for tensor in self))


class EpisodeSource(Protocol):
    """Whatever episodes come from: pictures, curves, lines."""

    def sample(self, count: int) -> Episode:
        """The next `count` tasks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which the same episodes follow."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        ...


class EpisodePlan(NamedTuple):
    """Which items make a batch of tasks, in random order inside each task; all int64.

    Attributes:
        classes: [tasks, way], class that stands behind each target.
        support_items: [tasks, way * shot], positions in the labels.
        support_targets: [tasks, way * shot], in [0, way).
        query_items: [tasks, way * query].
        query_targets: [tasks, way * query].
    """

    classes: Tensor
    support_items: Tensor
    support_targets: Tensor
    query_items: Tensor
    query_targets: Tensor


class EpisodeSampler:
    """Draws tasks from labels; nothing else of the data is read.

    Args:
        labels: class of every item, integers in [0, classes), [items].
        way: classes of a task (N).
        shot: support items of a class (K).
        query: query items of a class (Q).
        seed: of the sampler's own generator.
        names: of the classes, for messages.
        groups: group (say, alphabet) of every class; then the classes of a task come from one
            group, drawn evenly among those with at least `way` classes.
        aligned: the j-th item of every class has the same author, so that a task takes the same
            positions in all its classes: support from `shot` authors, queries from `query` others.

    Raises:
        ValueError: too few classes, in all or in every group; or too few items in a class; or
            classes of unequal sizes although aligned.
    """

    def __init__(
        self,
        labels: Sequence[int] | NDArray[np.integer[Any]] | Tensor,
        way: int,
        shot: int,
        query: int,
        seed: int,
        *,
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        aligned: bool = False,
    ) -> None:
        self.way, self.shot, self.query, self.aligned = way, shot, query, aligned
        _check_task(way, shot, query)
        self._items = _items_by_class(labels)
        _check_items(self._items, shot, query, names, aligned)
        self._pools = _pools(len(self._items), way, groups)
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, count: int) -> EpisodePlan:
        """The next `count` tasks.

        Raises:
            ValueError: fewer than one.
        """
        if count < 1:
            raise ValueError(
                f"no episode was asked for; expected at least 1 task, found {count}; ask for more"
            )
        tasks = [self._task() for _ in range(count)]
        return EpisodePlan(*(torch.stack(column) for column in zip(*tasks, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator; everything else follows from the arguments."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the sampler with this state stood."""
        self.generator.set_state(state["generator"])

    def _task(self) -> EpisodePlan:
        pool = self._pools[0]
        if len(self._pools) > 1:
            chosen = torch.randint(len(self._pools), (), generator=self.generator)
            pool = self._pools[int(chosen)]
        classes = pool[self._permutation(len(pool))[: self.way]]
        taken = torch.stack([self._items_of(index) for index in self._positions(classes)])
        support, support_targets = self._shuffled(taken[:, : self.shot])
        query, query_targets = self._shuffled(taken[:, self.shot :])
        return EpisodePlan(classes, support, support_targets, query, query_targets)

    def _positions(self, classes: Tensor) -> list[tuple[int, Tensor]]:
        """For each class, positions among its items of the support and then of the queries."""
        length = self.shot + self.query
        numbers = classes.tolist()
        if self.aligned:
            shared = self._permutation(len(self._items[numbers[0]]))[:length]
            return [(number, shared) for number in numbers]
        return [
            (number, self._permutation(len(self._items[number]))[:length]) for number in numbers
        ]

    def _items_of(self, place: tuple[int, Tensor]) -> Tensor:
        number, positions = place
        return self._items[number][positions]

    def _shuffled(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Items [way, each] and their targets in one random order: an order would be a hint."""
        targets = torch.arange(len(items)).repeat_interleave(items.shape[1])
        order = self._permutation(len(targets))
        return items.flatten()[order], targets[order]

    def _permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator)


def _check_task(way: int, shot: int, query: int) -> None:
    if way < 2 or shot < 1 or query < 1:
        raise ValueError(
            "this is no task; expected at least 2 classes, 1 support and 1 query picture of each, "
            f"found way {way}, shot {shot}, query {query}; choose larger numbers"
        )


def _items_by_class(
    labels: Sequence[int] | NDArray[np.integer[Any]] | Tensor,
) -> list[Tensor]:
    """Positions of the items of each class, ascending."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            "these are no labels; expected integers in one dimension, found "
            f"{array.dtype} of shape {array.shape}; give one class number an item"
        )
    if array.min() < 0:
        raise ValueError(
            f"a label is negative; expected classes from 0 on, found {int(array.min())}; "
            "number the classes from 0"
        )
    counts = np.bincount(array)
    order = torch.from_numpy(np.argsort(array, kind="stable"))
    return list(order.split(counts.tolist()))


def _check_items(
    items: list[Tensor], shot: int, query: int, names: Sequence[str] | None, aligned: bool
) -> None:
    for number, positions in enumerate(items):
        if len(positions) < shot + query:
            name = f"{names[number]!r}" if names is not None else f"number {number}"
            raise ValueError(
                f"the class {name} has too few pictures; expected at least {shot + query} "
                f"({shot} support + {query} query), found {len(positions)}; ask for fewer shots "
                "or queries, add pictures, or leave the class out"
            )
    sizes = {len(positions) for positions in items}
    if aligned and len(sizes) > 1:
        raise ValueError(
            "the classes have unequal numbers of pictures; expected equal ones for aligned "
            f"episodes, found {min(sizes)} to {max(sizes)}; draw episodes that are not aligned"
        )


def _pools(num_classes: int, way: int, groups: Sequence[str] | None) -> list[Tensor]:
    """The sets of classes from which the classes of a task may be drawn."""
    if num_classes < way:
        raise ValueError(
            f"there are too few classes; expected at least {way} for {way}-way episodes, found "
            f"{num_classes}; ask for fewer ways or add classes"
        )
    if groups is None:
        return [torch.arange(num_classes)]
    if len(groups) != num_classes:
        raise ValueError(
            f"the groups do not fit the classes; expected {num_classes}, found {len(groups)}; "
            "give one group a class"
        )
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    pools = [torch.tensor(numbers) for numbers in members.values() if len(numbers) >= way]
    if not pools:
        largest = max(members, key=lambda group: len(members[group]))
        raise ValueError(
            f"no group has enough classes; expected at least {way} for {way}-way episodes within a "
            f"group, found at most {len(members[largest])} ({largest!r}); ask for fewer ways or "
            "draw from all classes"
        )
    return pools
