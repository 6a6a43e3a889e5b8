"""Training reads articles in rows without end: pass after pass, each shuffled in its own way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metalm.language.text.article_batches import ArticleRows
from metalm.language.text.articles import ArticleSet


class ArticlePasses:
    """Rows of articles that never run out.

    The order of a pass follows from the seed and the number of the pass alone, so that a resumed
    training meets the same tokens.

    Args:
        articles: what is read.
        rows: how many at once.
        seed: of the order.
        carry_rows: how many of the rows read on across articles.
    """

    def __init__(self, articles: ArticleSet, rows: int, seed: int, carry_rows: int = 0) -> None:
        self._articles, self._seed = _Tokens(articles), seed
        self._num_rows, self._carry_rows = rows, carry_rows
        self._entered = 0
        self.rows = self._new_rows()

    def _new_rows(self) -> ArticleRows:
        return ArticleRows(self._articles, self._order(), self._num_rows, self._carry_rows)

    def _order(self) -> Iterator[int]:
        count = len(self._articles)
        while True:
            number, place = divmod(self._entered, count)
            order = np.random.default_rng([self._seed, number]).permutation(count)
            for index in order[place:]:
                self._entered += 1
                yield int(index)

    def state_dict(self) -> dict[str, Any]:
        """How many articles have been entered, and where every row stands."""
        return {"entered": self._entered, "positions": [list(at) for at in self.rows.positions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._entered = state["entered"]
        self.rows = self._new_rows()
        self.rows.restore(state["positions"])


class _Tokens(Sequence[NDArray[np.int32]]):
    """The token arrays of a set of articles, read when asked for."""

    def __init__(self, articles: ArticleSet) -> None:
        self._articles = articles

    def __len__(self) -> int:
        return len(self._articles)

    def __getitem__(self, index: Any) -> Any:
        return self._articles.tokens(index)
