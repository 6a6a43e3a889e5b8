"""Reading with any language model: every token is scored, then the weights learn from it.

The model is any `nn.Module` that takes `(tokens, state)` and gives `(logits, state)`. Each text has
fast weights of its own, and one step of `metalm.meta.unroll` reads each segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from metalm.adapt import reading_state
from metalm.adapt.module_loss import ModuleLoss, Segment, SegmentScore
from metalm.adapt.reading_state import ReadingState
from metalm.adapt.text_rows import (
    Memory,
    TextRow,
    groups,
    of_the_vocabulary,
    one_of,
    selected,
    stacked,
    token_ids,
)
from metalm.adapt.token_losses import check_surprise
from metalm.meta.fork import forgotten
from metalm.meta.parameters import Parameters, choose, split
from metalm.meta.tree import detach
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule, Coefficients


class Reading(NamedTuple):
    """What reading a text gave."""

    nats: NDArray[np.float64]
    """Minus log probability of every token, [tokens]; nan for the first token of a text that
    begins without a start token, since it follows nothing."""
    state: ReadingState
    """Where the reading stands; the next part of the text is read from here."""


class AdaptiveReader:
    """A model that learns while it reads.

    A token is scored before anything is learnt from it. Segments are counted from where a call to
    `read` begins, and the end of a call ends a segment: a text read in parts gives the scores of
    the whole text when each part but the last is a multiple of `segment` long. (Without a start
    token the first token only begins the text; then the first part has one more.)

    Args:
        model: ``(tokens, state) -> (logits, state)``, in float32 or float64; not changed, and read
            in evaluation mode. It may also give an object with the attributes ``logits`` and
            ``state``. The state is None, a tensor, or a tree of them (tuples, lists, mappings).
        rule: how the fast weights follow from their gradient; None reads without learning.
        fast: patterns of the names of the parameters that learn, such as ``"*"`` or
            ``"embedding.*"``; None takes those that the rule was made for, or else all.
        segment: tokens between two updates.
        start_token: what the first token of a text follows; with None that token is not scored.
        initial_state: gives the model's state at the start of so many texts; None begins with None.
        batch_first: whether tokens are [batch, time] and logits [batch, time, vocabulary];
            otherwise [time, batch] and [time, batch, vocabulary].
        surprise: what is learnt from weighs each token by its own loss to this power (`by_surprise`
            in `token_losses.py`); scores stay what they are. 0 weighs all alike.

    Raises:
        ValueError: no module, no such parameters, parameters in half precision, a rule that was
            made for other parameters, a segment without tokens, or a negative surprise.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: AbstractUpdateRule | None = None,
        fast: Sequence[str] | None = None,
        *,
        segment: int = 20,
        start_token: int | None = None,
        initial_state: Callable[[int], Any] | None = None,
        batch_first: bool = True,
        surprise: float = 0.0,
    ) -> None:
        check_surprise(surprise)
        if not isinstance(model, nn.Module):
            raise ValueError(
                "the model has no parameters that could learn; expected a torch.nn.Module, found "
                f"{type(model).__name__}; make a function the forward of a module that holds them"
            )
        if segment < 1:
            raise ValueError(
                f"a segment has tokens; expected at least 1, found {segment}; do change it"
            )
        self.model, self.rule, self.segment = model, rule, segment
        self.start_token, self.initial_state = start_token, initial_state
        self.batch_first, self.surprise = batch_first, surprise
        made_for = getattr(rule, "names", None)
        self.fast_names = choose(model, (made_for or ("*",)) if fast is None else fast)
        _check_names(self.fast_names, made_for)
        slow, rest = split(model, self.fast_names)
        self.slow, self.rest = forgotten(slow), forgotten(rest)
        _check_precision(self.slow)
        self.loss = ModuleLoss(model, self.fast_names, segment, batch_first, surprise)

    def with_rule(self, rule: AbstractUpdateRule | None) -> AdaptiveReader:
        """The same model and fast weights under another rule."""
        return AdaptiveReader(
            self.model,
            rule,
            self.fast_names,
            segment=self.segment,
            start_token=self.start_token,
            initial_state=self.initial_state,
            batch_first=self.batch_first,
            surprise=self.surprise,
        )

    @property
    def device(self) -> torch.device:
        """Where the fast weights live."""
        return next(iter(self.slow.values())).device

    def start(self) -> ReadingState:
        """The state at the start of a text: W_0 (the model's own tensors) and empty memories."""
        return ReadingState(
            fast=self.slow,
            rule_state=None if self.rule is None else self.rule.initial_state(self.slow),
            model_state=None if self.initial_state is None else detach(self.initial_state(1)),
            last_token=self.start_token,
        )

    def read(self, tokens: ArrayLike | Tensor, state: ReadingState | None = None) -> Reading:
        """Scores every token of a text and learns from it.

        Args:
            tokens: ids, integers [tokens].
            state: where an earlier call stopped, and it stays as it is; None begins a text.

        Returns:
            nats [tokens], and the state after the last token.

        Raises:
            ValueError: no tokens, or one beyond the vocabulary.
        """
        return self.read_texts([tokens], None if state is None else [state])[0]

    @torch.inference_mode(False)  # learning takes gradients, also where the caller wants none
    def read_texts(
        self,
        texts: Sequence[ArrayLike | Tensor],
        states: Sequence[ReadingState] | None = None,
        *,
        together: int = 1,
    ) -> list[Reading]:
        """Reads several texts, each with weights of its own.

        Args:
            texts: token ids of each, integers [tokens].
            states: where each goes on; None begins all of them.
            together: how many are read at once, through `torch.vmap`; 1 reads one after the other,
                which works for every model. The scores differ in rounding only.

        Returns:
            What `read` gives, for each text.

        Raises:
            ValueError: as `read`; states of another number; a model that vmap cannot run.
        """
        if states is not None and len(states) != len(texts):
            raise ValueError(
                f"the states do not fit the texts; expected {len(texts)}, found {len(states)}; "
                "give one for each text"
            )
        if together < 1:
            raise ValueError(
                f"texts are read together; expected at least 1, found {together}; do change it"
            )
        begun = [self.start() for _ in texts] if states is None else states
        pairs = zip(texts, begun, strict=True)
        rows = [TextRow(token_ids(text, self.device), state) for text, state in pairs]
        with evaluating(self.model), torch.no_grad():
            coefficients = None if self.rule is None else self.rule.coefficients()
            if together > 1:
                for group in groups(rows, together):
                    self._read_group(group, coefficients)
            for row in rows:
                while row.left > 0:
                    self._read_segment(row, coefficients)
        return [Reading(row.scores(), row.state()) for row in rows]

    def save(self, state: ReadingState, path: Path | str) -> None:
        """Writes a state to one safetensors file with a checksum.

        Raises:
            ValueError: the state holds something that no file can hold or that loading could not
                restore, or the file cannot be written.
        """
        reading_state.save(state, path, self.model, self.rule, self.start())

    def load(self, path: Path | str) -> ReadingState:
        """Reads a state that `save` wrote; no code is executed.

        Raises:
            ValueError: no such file, a damaged one, or a state of another model or kind of rule.
        """
        return reading_state.load(path, self.model, self.rule, self.start())

    def _read_segment(self, row: TextRow, coefficients: Coefficients) -> None:
        score, row.memory = self._score_and_learn(row.take(self.segment), row.memory, coefficients)
        row.keep(score.nats)
        if self._lost(score, row.memory.fast)[0]:
            row.fall_back(self.start())

    def _read_group(self, rows: list[TextRow], coefficients: Coefficients) -> None:
        """Full segments of several texts at once; what ends or falls back leaves the group."""
        rows = [row for row in rows if row.left >= self.segment]
        if len(rows) < 2:
            return
        memory = stacked([row.memory for row in rows])
        while rows:
            segments = [row.take(self.segment) for row in rows]
            batch = Segment(*(torch.stack(parts) for parts in zip(*segments, strict=True)))
            score, memory = self._score_and_learn(batch, memory, coefficients)
            lost = self._lost(score, memory.fast)
            stay = []
            for place, row in enumerate(rows):
                row.keep(score.nats[place])
                if lost[place]:
                    row.fall_back(self.start())
                elif row.left < self.segment:
                    row.memory = one_of(memory, place)
                else:
                    stay.append(place)
            if len(stay) < len(rows):
                rows, memory = [rows[place] for place in stay], selected(memory, stay)

    def _score_and_learn(
        self, batch: Segment, memory: Memory, coefficients: Coefficients
    ) -> tuple[SegmentScore, Memory]:
        with of_the_vocabulary(batch.targets):
            if self.rule is None:
                parameters = {**self.rest, **memory.fast}
                _, score, state = self.loss(parameters, batch, memory.model_state)
                return score, memory._replace(model_state=detach(state))
            after = unroll(
                self.loss,
                self.rule,
                self.slow,
                self.rest,
                [batch],
                memory.model_state,
                fast=memory.fast,
                rule_state=memory.rule_state,
                coefficients=coefficients,
                order=0,
                overwrite=True,
            )
        return after.aux[0], Memory(after.fast, after.rule_state, after.state)

    def _lost(self, score: SegmentScore, fast: Parameters) -> list[bool]:
        """For each text, whether the rule blew up: bad weights, or a score far from sense."""
        lost = score.lost.reshape(-1)
        if self.rule is None:
            return [False] * len(lost)
        for weight in fast.values():
            lost = lost | ~weight.reshape(len(lost), -1).sum(1).isfinite()
        return [bool(value) for value in lost]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and its recurrent layers differentiable in it on any device.

    Afterwards each module is in the mode that it was in.
    """
    were_training = {module: module.training for module in model.modules()}
    cudnn = torch.backends.cudnn
    # cuDNN's recurrent layers have a backward pass in training mode only; torch's own always.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    model.eval()
    try:
        with cudnn.flags(enabled=cudnn.enabled and not recurrent):
            yield
    finally:
        for module, training in were_training.items():
            module.training = training


def _check_names(chosen: Sequence[str], made_for: Sequence[str] | None) -> None:
    if made_for is not None and set(made_for) != set(chosen):
        raise ValueError(
            f"the rule was made for other parameters; expected {', '.join(chosen)}, found "
            f"{', '.join(made_for)}; leave out `fast`, or count the gradients of these parameters"
        )


def _check_precision(slow: Parameters) -> None:
    for name, weight in slow.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is too coarse to learn; expected float32 or float64, found "
                f"{str(weight.dtype).removeprefix('torch.')}, which loses small updates; use "
                "model.float()"
            )
