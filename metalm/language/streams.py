"""Articles laid end to end in parallel rows: gradient statistics, and trainings that carry on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.language.articles import ArticleSet
from metalm.language.vocabulary import END_OF_LINE


class TokenStreams:
    """One pass over a set of articles: laid end to end, cut into rows of equal length.

    They are shuffled, unless their own order is asked for. The shuffle follows from the seed and
    the number of the pass alone. The few tokens that do not fill the last column of the rows are
    left out of that pass.

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
        tokens: NDArray[np.int32] = np.empty(articles.num_tokens + 1, dtype=np.int32)
        tokens[0] = END_OF_LINE
        end = 1
        for index in order:
            article = articles[int(index)].tokens
            tokens[end : end + len(article)] = article
            end += len(article)
        self._inputs = tokens[: rows * length].reshape(rows, length)
        self._targets = tokens[1 : rows * length + 1].reshape(rows, length)
        self.rows, self.length = rows, length

    def segment(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [time, rows], of up to `length` steps from `start`."""
        part = slice(start, min(start + length, self.length))
        inputs, targets = self._inputs[:, part].T, self._targets[:, part].T
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))
