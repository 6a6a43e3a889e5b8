"""What happens to the fast weights while articles are read: how far they go, and the rule's gates.

Recording hardly slows reading: a distance takes one more pass over the fast weights, and is taken
at every eighth update only; gates are means that the rule keeps anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.language.reading.flushing import Flushing
from metalm.meta.parameters import Parameters
from metalm.meta.rules.gated import Gated
from metalm.meta.update_rule import AbstractUpdateRule, RuleState

EVERY = 8
"""Updates between two distances."""

DISTANCE, UPDATE, FLUSH = "distance", "update", "flush"
"""||W_t - W_0|| / ||W_0||, and the mean over a tensor's coordinates of each gate; the flush is 1
where all weights went back because an article begins (`flushing.py`)."""


class Curves(NamedTuple):
    """One quantity of every fast tensor, along texts."""

    quantity: str
    """distance, update or flush."""
    names: tuple[str, ...]
    """The fast tensors."""
    places: list[NDArray[np.int64]]
    """For each text, how many of its tokens had been read and learnt from [samples]."""
    values: list[NDArray[np.float32]]
    """For each text, the values there [samples, tensors]."""


class CurveRecorder:
    """Takes notes after every update of a reading.

    Args:
        slow: W_0 of the fast weights.
        rule: how they learn.
        num_texts: how many texts are read.
        every: updates between two distances.
    """

    def __init__(
        self, slow: Parameters, rule: AbstractUpdateRule, num_texts: int, every: int = EVERY
    ) -> None:
        self._slow, self._rule, self._every = slow, rule, every
        sizes = torch.stack([torch.linalg.vector_norm(w).double() for w in slow.values()])
        self._sizes = torch.where(sizes > 0, sizes, 1.0)
        self._updates = [0] * num_texts
        flushing = isinstance(rule, Flushing)
        gated = isinstance(_stepping(rule), Gated)
        gates = [UPDATE] * gated + [FLUSH] * (gated or flushing)
        self._places: dict[str, list[list[int]]] = {}
        self._values: dict[str, list[list[list[float]]]] = {}
        for quantity in (DISTANCE, *gates):
            self._places[quantity] = [[] for _ in range(num_texts)]
            self._values[quantity] = [[] for _ in range(num_texts)]

    @torch.no_grad()
    def note(self, places: Sequence[tuple[int, int]], fast: Parameters, state: RuleState) -> None:
        """Looks at all rows after an update.

        Args:
            places: text of each row, and how many of its tokens were read.
            fast: W_t, each ``[rows, *shape]``.
            state: of the rule.
        """
        for text, _ in places:
            self._updates[text] += 1
        due = [row for row, (text, _) in enumerate(places) if self._is_due(text)]
        if due:
            self._keep(DISTANCE, places, due, self._distances(fast, due))
        for quantity, values in self._gates(len(places), state).items():
            self._keep(quantity, places, range(len(places)), values)

    def curves(self) -> list[Curves]:
        """Everything that was noted."""
        names = tuple(self._slow)
        return [
            Curves(
                quantity,
                names,
                [np.array(text, np.int64) for text in places],
                [np.array(v, np.float32).reshape(-1, len(names)) for v in self._values[quantity]],
            )
            for quantity, places in self._places.items()
        ]

    def state(self) -> dict[str, Any]:
        """What was noted so far, as a tree of tensors."""
        return {
            "updates": self._updates,
            "places": {
                quantity: [torch.tensor(text, dtype=torch.int64) for text in texts]
                for quantity, texts in self._places.items()
            },
            "values": {
                quantity: [torch.tensor(text, dtype=torch.float32) for text in texts]
                for quantity, texts in self._values.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""
        self._updates = list(state["updates"])
        for name, kept in (("places", self._places), ("values", self._values)):
            for quantity, texts in state[name].items():
                kept[quantity] = [text.tolist() for text in texts]

    def _gates(self, rows: int, state: RuleState) -> dict[str, Tensor]:
        """The gates of all rows, each ``[rows, tensors]``; none for a rule without gates."""
        found: dict[str, Tensor] = {}
        rule = _stepping(self._rule)
        flushed = torch.zeros(rows, 1)
        if isinstance(self._rule, Flushing):
            flushed, state = state.flush.float().cpu().unsqueeze(1), state.inner
            found[FLUSH] = flushed.expand(rows, len(self._slow))
        if isinstance(rule, Gated):
            gates = rule.mean_gates(state)
            means = torch.stack([gates[name] for name in self._slow], 1)  # rows tensors gates
            found[UPDATE] = means[:, :, 0]
            # What went home whole has nothing left for a gate to take home.
            found[FLUSH] = torch.maximum(means[:, :, 1].cpu().float(), flushed)
        return found

    def _is_due(self, text: int) -> bool:
        # The first update too: a text may be short.
        return self._updates[text] % self._every == 1 % self._every

    def _distances(self, fast: Parameters, rows: Sequence[int]) -> Tensor:
        """Of these rows, ``[rows, tensors]``; as they are where a tensor of W_0 is zero."""
        far = [
            torch.stack([torch.linalg.vector_norm(fast[name][row] - home) for row in rows])
            for name, home in self._slow.items()
        ]
        return torch.stack(far, 1).double() / self._sizes

    def _keep(
        self, quantity: str, places: Sequence[tuple[int, int]], rows: Sequence[int], values: Tensor
    ) -> None:
        # As Python's own numbers: an array kept here would pin the block that it was cut from, and
        # a long reading would fill the memory with holes.
        for row, of_row in zip(rows, values.float().tolist(), strict=True):
            text, position = places[row]
            self._places[quantity][text].append(position)
            self._values[quantity][text].append(of_row)


def _stepping(rule: AbstractUpdateRule) -> AbstractUpdateRule:
    """The rule that takes the steps: that inside, where a flush is around it."""
    return rule.inner if isinstance(rule, Flushing) else rule


def along_articles(curves: Curves, lengths: Sequence[int]) -> Curves:
    """The same curves for each article, where texts were articles laid end to end.

    Args:
        curves: of one text, or of as many as there are articles.
        lengths: tokens of each article.
    """
    if len(curves.places) == len(lengths):
        return curves
    ends = np.cumsum(lengths)
    (places,), (values,) = curves.places, curves.values
    # What was noted at the very end of an article belongs to it.
    article = np.searchsorted(ends, places, side="left")
    cuts = np.searchsorted(article, np.arange(1, len(lengths)))
    starts = ends - np.asarray(lengths)
    return curves._replace(
        places=[p - start for p, start in zip(np.split(places, cuts), starts, strict=True)],
        values=np.split(values, cuts),
    )
