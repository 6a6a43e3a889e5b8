"""Articles laid end to end in parallel rows: gradient statistics, and trainings that carry on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.language.text.articles import ArticleSet
from metalm.language.text.vocabulary import END_OF_LINE


class TokenStreams:
    """One pass over a set of articles: laid end to end, cut into rows of equal length.

    They are shuffled, unless their own order is asked for. The shuffle follows from the seed and
    the number of the pass alone. The few tokens that do not fill the last column of the rows are
    left out of that pass. Tokens stay in their file until they are asked for.

    Args:
        articles: what is read.
        rows: parallel streams.
        seed: of the shuffle.
        number: which pass this is, from 0.
        shuffled: False for the articles in their own order; seed and number then mean nothing.
    """

    def __init__(
        self, articles: ArticleSet, rows: int, seed: int, number: int, *, shuffled: bool = True
    ) -> None:
        length = articles.num_tokens // rows
        if length < 2:
            raise ValueError(
                f"too little text for {rows} rows; expected at least {2 * rows} tokens, found "
                f"{articles.num_tokens}; use fewer rows or more text"
            )
        order = np.arange(len(articles))
        if shuffled:
            order = np.random.default_rng([seed, number]).permutation(len(articles))
        self._articles = articles.select(order)
        self._ends = np.cumsum(self._articles.lengths)
        self.rows, self.length = rows, length

    def segment(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [time, rows], of up to `length` steps from `start`."""
        count = max(0, min(length, self.length - start))
        rows = [self._tokens(row * self.length + start - 1, count + 1) for row in range(self.rows)]
        tokens = np.stack(rows, 1).astype(np.int64)
        return torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])

    def _tokens(self, place: int, count: int) -> NDArray[np.int32]:
        """So many tokens from a place of the whole text, before which stands an end of line."""
        parts = [np.full(max(0, -place), END_OF_LINE, dtype=np.int32)]
        missing, place = count - len(parts[0]), max(0, place)
        number = int(np.searchsorted(self._ends, place, side="right"))
        while missing > 0:
            begin = place - int(self._ends[number] - self._articles.lengths[number])
            part = self._articles.tokens(number)[begin : begin + missing]
            parts.append(part)
            missing, place, number = missing - len(part), place + len(part), number + 1
        return np.concatenate(parts)
