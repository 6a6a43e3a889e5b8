"""Reading: every token is scored once, and a segment is learnt from only after it has been scored.

One code path serves all methods. The static model reads without learning; dynamic evaluation and
metalm differ in the update rule alone; the cache looks at the same features. What is read is a list
of token arrays: the articles of a split (`reset`: every memory starts anew with each), or all of
them laid end to end (`carry`: nothing says where one ends).

In bfloat16, where that is asked for, are the matrix products of the model and of its gradient
(autocast, and `network/products.py`). Fast weights, the state of the rule and its step, the hidden
state between segments, losses and softmax, and all of the cache are in float32, and so is the
network that tells where articles begin. Within a segment the fused kernel of layers that all rows
share keeps its hidden state in bfloat16. Perplexities of 6,000 tokens or more then come out within
0.1 % of those in float32, of an article's first 1,500 within 0.5 %, single tokens within 0.4 nats
(measured on WikiText-2, EXPERIMENTS.md); so far they may also depend on how many are read at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.language.network.model import LanguageModel, ModelState
from metalm.language.network.segment_loss import SegmentLoss, SegmentScore, lost_rows
from metalm.language.reading.cache import CacheMemory
from metalm.language.reading.captured_step import Stepped, Steps
from metalm.language.reading.curves import CurveRecorder, Curves
from metalm.language.reading.standing import Memory, Standing, TokenScores
from metalm.language.reading.unfinished import Unfinished
from metalm.language.text.article_batches import (
    ArticleRows,
    SegmentBatch,
    select_first,
    select_rows,
    set_rows,
)
from metalm.meta.inner_problem import TwoLosses
from metalm.meta.parameters import Parameters, split
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule
from metalm.training.precision import (
    reduced_products,
    refuse_emulated_bfloat16,
    unrounded_float32,
)


@dataclass(frozen=True, kw_only=True)
class CacheGrid:
    """The flatnesses and the window for which cache probabilities are worked out while reading."""

    thetas: tuple[float, ...] = (0.66,)
    """theta of each."""
    window: int = 3785
    """Pairs kept."""


@dataclass
class Readings:
    """What reading gave, for each text in the order of the texts."""

    nats: list[NDArray[np.float64]]
    """Minus log probability of every token, [tokens]."""
    cache: list[NDArray[np.float64]] = field(default_factory=list)
    """log p_cache of every token, [flatnesses, tokens]; nan where the cache was empty."""
    confidence: list[NDArray[np.float32]] = field(default_factory=list)
    """How sure model and cache were before every token, where that was asked for: `confidence` of
    `network/segment_loss.py`, then that of `CacheScore`, [numbers, tokens]."""
    tempered: list[NDArray[np.float64]] = field(default_factory=list)
    """`nats` under other temperatures, where they were asked for, [temperatures, tokens]."""
    fallbacks: list[int] = field(default_factory=list)
    """How often the fast weights of each text fell back to W_0 because the rule blew up."""
    seconds: float = 0.0
    """Wall-clock time."""
    curves: list[Curves] = field(default_factory=list)
    """What was recorded of the fast weights; empty if nothing was."""

    @property
    def total(self) -> float:
        """Sum of all losses, in nats."""
        return float(sum(text.sum() for text in self.nats))

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return sum(len(text) for text in self.nats)


class Reader:
    """A model, how it learns while it reads, and how far it reads between two updates.

    Args:
        model: W_0 and the rest; not changed.
        rule: None for the static model.
        fast_names: parameters that the rule rewrites.
        segment: tokens between two updates.
        cache: None for no cache.
        confidence: whether to write down how sure model and cache were.
        temperatures: of the softmax, under which the tokens are scored too; what is learnt does not
            depend on them.
        surprise: power of its loss by which a token weighs in what is learnt from.
        bfloat16: whether matrix products are in bfloat16, see above.

    Raises:
        ValueError: a segment without tokens, or bfloat16 where the hardware has none.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: AbstractUpdateRule | None = None,
        fast_names: Sequence[str] = (),
        segment: int = 20,
        cache: CacheGrid | None = None,
        *,
        confidence: bool = False,
        temperatures: Sequence[float] = (),
        surprise: float = 0.0,
        bfloat16: bool = False,
    ) -> None:
        if segment < 1:
            raise ValueError(
                f"a segment has tokens; expected at least 1, found {segment}; do raise it"
            )
        if bfloat16:
            refuse_emulated_bfloat16(model.embedding.weight.device)
        self.model, self.rule, self.segment, self.cache = model, rule, segment, cache
        self.bfloat16 = bfloat16
        self.slow, self.rest = split(model, fast_names if rule is not None else ())
        self.loss = SegmentLoss(
            model, segment, confidence=confidence, temperatures=temperatures, surprise=surprise
        )

    @unrounded_float32()
    def read(
        self,
        texts: Sequence[NDArray[np.int32]],
        rows: int = 1,
        progress: Callable[[int, float], None] | None = None,
        recorder: CurveRecorder | None = None,
        unfinished: Unfinished | None = None,
    ) -> Readings:
        """Scores every token of every text; each text starts with fresh memories.

        Args:
            texts: token ids of each, at least one token.
            rows: how many texts are read at once; the result does not depend on it (but for
                rounding, which in bfloat16 is that said above).
            progress: told the number of tokens after each segment, and their summed loss.
            recorder: takes notes of the fast weights after every update.
            unfinished: where the reading is kept meanwhile, and goes on from if it was stopped.

        Raises:
            ValueError: an empty text, or a token beyond the vocabulary.
        """
        _check(texts, self.model.config.vocabulary_size)
        if rows < 1:
            raise ValueError(
                f"articles are read in rows; expected at least 1, found {rows}; do raise the number"
            )
        started = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        progress = progress or _silent
        steps = Steps(self.step, captured=self.model.fits_a_graph)
        try:
            standing = self._begin_or_go_on(texts, rows, recorder, unfinished)
            batch_rows, memory, scores = standing.rows, standing.memory, standing.scores
            before = standing.seconds
            if before > 0.0:
                progress(*scores.so_far())
            while len(batch_rows) > 0:
                places = batch_rows.positions
                batch = batch_rows.take(self.segment, self.model.embedding.weight.device)
                score, lost = steps(batch, memory)
                tokens, nats = scores.keep(places, batch, score, memory.caches)
                progress(tokens, nats)
                for row in _which(lost):
                    self._begin_again(row, batch_rows.positions[row], memory, scores)
                    standing.fallbacks[places[row][0]] += 1
                if recorder is not None:
                    recorder.note(batch_rows.positions, memory.fast, memory.rule_state)
                memory = standing.memory = self._turn_over(batch_rows, memory)
                standing.seconds = before + time.perf_counter() - started
                if unfinished is not None and len(batch_rows) > 0:
                    unfinished.keep(standing.tree)
        finally:
            steps.release()
            self.model.train(was_training)
        curves = [] if recorder is None else recorder.curves()
        return Readings(
            nats=scores.nats,
            cache=scores.cache,
            confidence=scores.confidence,
            tempered=scores.tempered,
            fallbacks=standing.fallbacks,
            seconds=before + time.perf_counter() - started,
            curves=curves,
        )

    def _begin_or_go_on(
        self,
        texts: Sequence[NDArray[np.int32]],
        rows: int,
        recorder: CurveRecorder | None,
        unfinished: Unfinished | None,
    ) -> Standing:
        """The start of a reading, or what was kept of it."""
        thetas = () if self.cache is None else self.cache.thetas
        scores = TokenScores(texts, thetas, self.loss)
        found = None if unfinished is None else unfinished.found()
        entered = 0 if found is None else found["entered"]
        waiting = iter(range(entered, len(texts)))
        # As many as there were: their memories are kept, and none is opened while others are read.
        rows = min(rows, max(1, len(texts))) if found is None else len(found["positions"])
        batch_rows = ArticleRows(texts, waiting, rows)
        if found is None:
            memory = self._fresh_memory(len(batch_rows.enter()))
            return Standing(batch_rows, memory, scores, [0] * len(texts), recorder)
        batch_rows.restore(found["positions"])
        batch_rows.entered = entered
        standing = Standing(
            batch_rows, self._fresh_memory(len(batch_rows)), scores, found["fallbacks"], recorder
        )
        standing.restore(found, self.model.embedding.weight.device)
        return standing

    def _fresh_memory(self, count: int) -> Memory:
        fast = {
            name: weight.detach().expand(count, *weight.shape).clone()
            for name, weight in self.slow.items()
        }
        rule_state = None if self.rule is None else self.rule.initial_state(fast)
        with torch.no_grad():
            coefficients = None if self.rule is None else self.rule.coefficients()
        return Memory(
            self.model.initial_state(count),
            fast,
            rule_state,
            [self._new_cache() for _ in range(count)],
            coefficients,
        )

    def _new_cache(self) -> CacheMemory | None:
        return None if self.cache is None else CacheMemory(self.cache.window)

    def _loss(
        self, parameters: Parameters, batch: SegmentBatch, state: ModelState
    ) -> tuple[Tensor | TwoLosses, SegmentScore, ModelState]:
        with reduced_products(batch.inputs.device, self.bfloat16):
            return self.loss(parameters, batch, state)

    def step(self, batch: SegmentBatch, memory: Memory) -> Stepped:
        """Scores a segment and learns from it.

        Rows are lost whose rule blew up: weights that are not finite, or a segment far worse than a
        uniform guess. Both are known before the next segment is scored, and the segment keeps the
        score that it got.
        """
        if self.rule is None:
            with torch.no_grad():
                _, said, memory.state = self._loss(self.rest, batch, memory.state)
            return Stepped(said, None)
        unrolled = unroll(
            self._loss,
            self.rule,
            self.slow,
            self.rest,
            [batch],
            memory.state,
            fast=memory.fast,
            rule_state=memory.rule_state,
            coefficients=memory.coefficients,
            order=0,
            overwrite=True,
        )
        memory.fast, memory.rule_state, memory.state = (
            unrolled.fast,
            unrolled.rule_state,
            unrolled.state,
        )
        score: SegmentScore = unrolled.aux[0]
        lost = lost_rows(score, batch, self.model.config.vocabulary_size)
        for weight in memory.fast.values():
            lost = lost | ~weight.flatten(1).sum(1).isfinite()
        return Stepped(score, lost)

    def _begin_again(
        self, row: int, place: tuple[int, int], memory: Memory, scores: TokenScores
    ) -> None:
        """Puts a row back to W_0, a zero hidden state and an empty cache, in place."""
        scores.settle(place, memory.caches[row])
        self._begin(memory, [row])
        memory.caches[row] = self._new_cache()

    def _begin(self, memory: Memory, rows: Sequence[int]) -> None:
        """Fresh fast weights, rule state and hidden state in these rows, in place."""
        if not rows:
            return
        with torch.no_grad():
            set_rows(memory.fast, rows, {name: self.slow[name] for name in memory.fast})
            fresh = self.model.initial_state(1)
            set_rows(memory.state, rows, select_first(fresh))
            if self.rule is not None and memory.rule_state is not None:
                initial = self.rule.initial_state(select_rows(memory.fast, rows[:1]))
                set_rows(memory.rule_state, rows, select_first(initial))

    def _turn_over(self, batch_rows: ArticleRows, memory: Memory) -> Memory:
        """Lets articles that wait enter, and rows without one leave."""
        entered = batch_rows.enter()
        self._begin(memory, entered)
        for row in entered:
            memory.caches[row] = self._new_cache()
        keep = batch_rows.leave()
        if keep is None or not keep:
            return memory
        return Memory(
            select_rows(memory.state, keep),
            select_rows(memory.fast, keep),
            select_rows(memory.rule_state, keep),
            [memory.caches[row] for row in keep],
            memory.coefficients,
        )


def _which(rows: Tensor | None) -> list[int]:
    """Numbers of the rows that are marked."""
    found: list[int] = [] if rows is None else rows.nonzero().flatten().tolist()
    return found


def _silent(tokens: int, nats: float) -> None:
    del tokens, nats


def _check(texts: Sequence[NDArray[np.int32]], vocabulary_size: int) -> None:
    for number, text in enumerate(texts):
        if len(text) == 0:
            raise ValueError(
                f"nothing to read in text {number}; expected at least one token, found none; leave "
                f"empty "
                "articles out"
            )
        outside = np.flatnonzero((text < 0) | (text >= vocabulary_size))
        if len(outside) > 0:
            raise ValueError(
                f"a token of text {number} is beyond the model's vocabulary; expected ids in [0, "
                f"{vocabulary_size}), found {int(text[outside[0]])} at position {int(outside[0])}; "
                f"use the "
                "corpus and tokenizer that the model was trained with"
            )
