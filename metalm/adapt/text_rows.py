"""Texts on their way through a reading: how far each has come, and what it has in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from metalm.adapt.module_loss import Segment
from metalm.adapt.reading_state import ReadingState
from metalm.meta import tree
from metalm.meta.parameters import Parameters
from metalm.meta.tree import transform
from metalm.meta.update_rule import RuleState

_LARGEST = 2**63 - 1  # of int64


class Memory(NamedTuple):
    """What changes while a text is read; of several texts, with a leading dimension."""

    fast: Parameters
    rule_state: RuleState
    model_state: Any


class TextRow:
    """One text.

    Args:
        tokens: int64 [tokens].
        state: where the text begins; not changed.
    """

    def __init__(self, tokens: Tensor, state: ReadingState) -> None:
        before = [] if state.last_token is None else [state.last_token]
        self._tokens = torch.cat((tokens.new_tensor(before), tokens))
        self._unscored = 1 - len(before)
        self._position, self._nats, self._fallbacks = 0, list[Tensor](), 0
        self._begun = state
        self.memory = _own_memory(state)

    @property
    def left(self) -> int:
        """Tokens still to be scored."""
        return len(self._tokens) - 1 - self._position

    def take(self, segment: int) -> Segment:
        """The next tokens, up to `segment` of them."""
        start, end = self._position, self._position + min(segment, self.left)
        self._position = end
        return Segment(self._tokens[start:end], self._tokens[start + 1 : end + 1])

    def keep(self, nats: Tensor) -> None:
        """Keeps the scores [time] of a segment."""
        self._nats.append(nats)

    def fall_back(self, fresh: ReadingState) -> None:
        """Goes on with W_0 and fresh memories: decided before the next segment is scored."""
        self.memory = _own_memory(fresh)
        self._fallbacks += 1

    def scores(self) -> NDArray[np.float64]:
        """Minus log probability of every token, [tokens]."""
        nats = np.full(self._unscored, np.nan)
        if self._nats:
            nats = np.concatenate((nats, torch.cat(self._nats).double().cpu().numpy()))
        return nats

    def state(self) -> ReadingState:
        """Where the text stands."""
        num_tokens = len(self._tokens) - 1 + self._unscored
        return replace(
            self._begun,
            **self.memory._asdict(),
            last_token=int(self._tokens[-1]),
            num_tokens=self._begun.num_tokens + num_tokens,
            fallbacks=self._begun.fallbacks + self._fallbacks,
        )


def _own_memory(state: ReadingState) -> Memory:
    """The memory of a state in storage of its own, which rule and model may overwrite."""
    memory = Memory(state.fast, state.rule_state, state.model_state)
    own: Memory = transform(memory, torch.clone)
    return own


def token_ids(tokens: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """Token ids as int64 [tokens].

    Raises:
        ValueError: none, not whole numbers, out of range, or not one-dimensional.
    """
    if isinstance(tokens, Tensor):  # numpy has no bfloat16
        tokens = (tokens.double() if tokens.is_floating_point() else tokens).detach().cpu().numpy()
    ids = np.asarray(tokens)
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
        raise ValueError(
            "these are no token ids; expected at least one integer in one dimension, found the "
            f"shape {list(ids.shape)} of {ids.dtype}; encode the text first, and leave empty texts "
            "out"
        )
    if ids.min() < 0 or ids.max() > _LARGEST:
        raise ValueError(
            f"a token is no id; expected numbers from 0 to {_LARGEST}, found {ids.min()} to "
            f"{ids.max()}; use the tokenizer that the model was trained with"
        )
    return torch.from_numpy(ids.astype(np.int64)).to(device)


@contextmanager
def of_the_vocabulary(tokens: Tensor) -> Iterator[None]:
    """Says which tokens they were where the model finds one beyond its vocabulary.

    Raises:
        ValueError: in place of the model's IndexError.
    """
    try:
        yield
    except IndexError as error:
        raise ValueError(
            "a token is beyond the model's vocabulary; expected ids that the model has, found "
            f"{int(tokens.min())} to {int(tokens.max())} ('{error}'); use the tokenizer that the "
            "model was trained with"
        ) from error


def groups(rows: Sequence[TextRow], together: int) -> Iterator[list[TextRow]]:
    """Texts whose memories can be stacked, at most so many in a group; long texts first."""
    alike: dict[Any, list[TextRow]] = {}
    for row in sorted(rows, key=lambda row: -row.left):
        form = tree.form((row.memory.rule_state, row.memory.model_state))
        alike.setdefault(form, []).append(row)
    for same in alike.values():
        yield from (same[start : start + together] for start in range(0, len(same), together))


def stacked(memories: Sequence[Memory]) -> Memory:
    """The memories of several texts in one."""
    parts = zip(*(tree.tensors(memory) for memory in memories), strict=True)
    joined: Memory = tree.replace(memories[0], [torch.stack(same) for same in parts])
    return joined


def selected(memory: Memory, places: Sequence[int]) -> Memory:
    """The memories of some of several texts, still in one."""
    chosen: Memory = transform(memory, lambda tensor: tensor[list(places)])
    return chosen


def one_of(memory: Memory, place: int) -> Memory:
    """The memory of one of several texts, in storage of its own."""
    chosen: Memory = transform(memory, lambda tensor: tensor[place].clone())
    return chosen
