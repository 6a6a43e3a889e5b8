"""Many articles at once: rows of a batch that articles enter, are read in, and leave.

Each row reads one article from its start, segment after segment. A row whose article has ended
takes the next one; when there is none left, the row leaves the batch. Rows that carry on do not
stop there: the next article follows in the same segment, as if all were one text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.language.text.vocabulary import END_OF_LINE


class SegmentBatch(NamedTuple):
    """The next segment of every row; rows that end earlier are padded."""

    inputs: Tensor
    """int64 [time, rows]; the first input of an article is an end of line."""
    targets: Tensor
    """int64 [time, rows], the token that follows each input."""
    mask: Tensor
    """float32 [time, rows], 1 where there is a token to score."""


@dataclass
class _Row:
    """Where a row stands: its article (its number in the order of entry) and the next token."""

    article: int
    tokens: NDArray[np.int32]
    position: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.position

    def read(self, count: int) -> NDArray[np.int32]:
        """Up to so many of the tokens that are left."""
        tokens = self.tokens[self.position : self.position + count]
        self.position += len(tokens)
        return tokens


class ArticleRows:
    """The rows of a batch and the articles that wait for one.

    Args:
        articles: token arrays, int32 [tokens].
        order: which article enters next; may be endless.
        rows: how many are read at once.
        carry_rows: how many of them, the first ones, carry on; `order` must then be endless.
    """

    def __init__(
        self,
        articles: Sequence[NDArray[np.int32]],
        order: Iterator[int],
        rows: int,
        carry_rows: int = 0,
    ) -> None:
        self._articles, self._order, self._capacity = articles, order, rows
        self._carry_rows = carry_rows
        self._rows: list[_Row] = []
        self.entered = 0
        """Articles that have entered so far, but for those that followed in rows that carry on."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def positions(self) -> list[tuple[int, int]]:
        """For each row, the article and the number of its tokens already read."""
        return [(row.article, row.position) for row in self._rows]

    def restore(self, positions: Sequence[Sequence[int]]) -> None:
        """Puts the rows back to what `positions` said; the order is the caller's to restore."""
        self._rows = [_Row(a, self._articles[a], position) for a, position in positions]

    def enter(self) -> list[int]:
        """Gives rows whose article has ended the next article; opens rows while there is room.

        Returns:
            The rows that begin an article now, afresh. Rows that stay ended wait for `leave`.
        """
        entered = []
        for number in range(self._capacity):
            if number < len(self._rows) and self._goes_on(number):
                continue
            article = next(self._order, None)
            if article is None:
                break
            self.entered += 1
            row = _Row(article, self._articles[article])
            if number < len(self._rows):
                self._rows[number] = row
            else:
                self._rows.append(row)
            entered.append(number)
        return entered

    def _goes_on(self, number: int) -> bool:
        return number < self._carry_rows or self._rows[number].left > 0

    def leave(self) -> list[int] | None:
        """Drops rows whose article has ended.

        Returns:
            The numbers that the remaining rows had, or None when all remain.
        """
        keep = [number for number, row in enumerate(self._rows) if row.left > 0]
        if len(keep) == len(self._rows):
            return None
        self._rows = [self._rows[number] for number in keep]
        return keep

    def take(self, segment: int, device: torch.device | str = "cpu") -> SegmentBatch:
        """Reads up to `segment` tokens in every row; no longer than the longest remainder."""
        longest = segment if self._carry_rows else max(row.left for row in self._rows)
        time = max(1, min(segment, longest))
        shape = (time, len(self._rows))
        inputs = np.full(shape, END_OF_LINE, dtype=np.int64)
        targets = np.full(shape, END_OF_LINE, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.float32)
        for number in range(len(self._rows)):
            before, tokens = self._next(number, time)
            count = len(tokens)
            if count == 0:
                continue
            targets[:count, number] = tokens
            inputs[0, number] = before
            inputs[1:count, number] = tokens[:-1]
            mask[:count, number] = 1.0
        parts = (torch.from_numpy(part).to(device) for part in (inputs, targets, mask))
        return SegmentBatch(*parts)

    def _next(self, number: int, count: int) -> tuple[int, NDArray[np.int32]]:
        """The token before, and up to `count` tokens that a row now reads."""
        row = self._rows[number]
        before = int(row.tokens[row.position - 1]) if row.position > 0 else END_OF_LINE
        tokens = row.read(count)
        while number < self._carry_rows and len(tokens) < count:
            article = next(self._order)
            row = self._rows[number] = _Row(article, self._articles[article])
            tokens = np.concatenate([tokens, row.read(count - len(tokens))])
        return before, tokens


def set_rows(tree: Any, rows: Sequence[int], value: Any) -> None:
    """Writes `value`, which has no leading dimension, into rows of every tensor, in place.

    The two are trees of one form; what has a name goes where that name is.
    """
    if tree is None:
        return
    if isinstance(tree, Tensor):
        for row in rows:
            tree[row] = value
        return
    parts = tree if isinstance(tree, dict) else range(len(tree))
    for part in parts:
        set_rows(tree[part], rows, value[part])


def select_rows(tree: Any, rows: Sequence[int]) -> Any:
    """The same tree of tensors with these rows only."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return tree[torch.as_tensor(list(rows), device=tree.device)]
    if isinstance(tree, dict):
        return {name: select_rows(value, rows) for name, value in tree.items()}
    if hasattr(tree, "_fields"):
        return type(tree)(*(select_rows(value, rows) for value in tree))
    return tuple(select_rows(value, rows) for value in tree)


def select_first(tree: Any) -> Any:
    """The first row of every tensor of a tree, without its leading dimension."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return tree[0]
    if isinstance(tree, dict):
        return {name: select_first(value) for name, value in tree.items()}
    return tuple(select_first(value) for value in tree)
