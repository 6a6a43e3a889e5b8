"""The rows of a batch that are read here: all, or the part that this process has of them.

Every process takes the whole batch from the text, so that all of them stand at the same place, and
reads its own rows. Within a process they may be read in several parts, one after the other, which
takes less memory. Losses and gradients are summed over all parts; each counts its rows over the
tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.meta.tree import transform
from metalm.training import processes


class RowShare(NamedTuple):
    """Rows `start` to before `stop` of a batch of `total`."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        """How many rows."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the batch."""
        return self.size == self.total

    def unless_whole(self) -> RowShare | None:
        """These rows, or None where they are all of the batch."""
        return None if self.is_whole else self

    def columns(self, batch: Any) -> Any:
        """A named tuple of tensors [time, total, ...], with these rows alone."""
        if self.is_whole:
            return batch
        return type(batch)(*(part[:, self.start : self.stop].contiguous() for part in batch))

    def places(self, rows: Sequence[int]) -> list[int]:
        """Which of these rows of the batch are here, counted from `start`."""
        return [row - self.start for row in rows if self.start <= row < self.stop]

    def of(self, tree: Any) -> Any:
        """A tree of tensors [total, ...], with these rows alone; in memory of its own if fewer."""
        if self.is_whole:
            return tree
        return transform(tree, lambda tensor: tensor[self.start : self.stop].clone())

    def within(self, other: RowShare, tree: Any) -> Any:
        """Views of these rows in a tree of tensors that has the rows of another share."""
        if self == other:
            return tree
        place = slice(self.start - other.start, self.stop - other.start)
        return transform(tree, lambda tensor: tensor[place])

    def parts(self, count: int) -> list[RowShare]:
        """Cuts into so many parts, as equal as can be."""
        cuts = [self.start + self.size * number // count for number in range(count + 1)]
        return [RowShare(start, stop, self.total) for start, stop in pairwise(cuts)]


def own_share(rows: int) -> RowShare:
    """What this process has of a batch.

    Raises:
        ValueError: there are fewer rows than processes.
    """
    count = processes.count()
    if rows < count:
        raise ValueError(
            f"a batch has too few rows for {count} processes; expected at least as many, found "
            f"{rows}; use fewer processes, or more rows"
        )
    return RowShare(0, rows, rows).parts(count)[processes.rank()]


def own_parts(rows: int, count: int) -> list[RowShare]:
    """What this process has of a batch, in so many parts.

    Raises:
        ValueError: there are fewer rows than parts.
    """
    own = own_share(rows)
    if not 1 <= count <= own.size:
        raise ValueError(
            f"{own.size} rows cannot be read in {count} parts; expected 1 to {own.size}, found "
            f"{count}; change --accumulation"
        )
    return own.parts(count)


def are_one_piece(parts: Sequence[RowShare]) -> bool:
    """Whether all rows of a batch are here, and read at once."""
    return len(parts) == 1 and parts[0].is_whole


def whole(tree: Any, rows: int) -> Any:
    """A tree of tensors [own rows, ...] with the rows of all processes, in process 0."""
    sizes = [share.size for share in RowShare(0, rows, rows).parts(processes.count())]
    return transform(tree, lambda tensor: processes.stacked(tensor, sizes))


def in_turn(parts: Sequence[RowShare]) -> Iterator[RowShare]:
    """Goes through parts of one batch, with the same random numbers for each.

    Whoever draws for a part draws for all rows of the batch and takes his: so that the numbers do
    not depend on how it is cut.
    """
    states = _torch_states() if len(parts) > 1 else None
    for part in parts:
        if states is not None:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1])
        yield part


def _torch_states() -> tuple[Tensor, Tensor | None]:
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None
