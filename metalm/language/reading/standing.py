"""How far a reading has come: the memories of its rows, the scores so far, and both as a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.language.network.model import ModelState
from metalm.language.network.segment_loss import SegmentLoss, SegmentScore
from metalm.language.reading.cache import CacheMemory, asked_together
from metalm.language.reading.curves import CurveRecorder
from metalm.language.text.article_batches import ArticleRows, SegmentBatch
from metalm.meta.parameters import Parameters
from metalm.meta.tree import formed, transform
from metalm.meta.update_rule import Coefficients, RuleState


@dataclass
class Memory:
    """The memories of all rows: short term, medium term, and the cache."""

    state: ModelState
    """What the model carries."""
    fast: Parameters
    """W_t, each [rows, *shape]."""
    rule_state: RuleState
    """What the rule carries."""
    caches: list[CacheMemory | None]
    """Of each row; None for no cache."""
    coefficients: Coefficients
    """What the rule worked out once for the whole reading."""


@dataclass
class Standing:
    """How far a reading has come, and all that goes on from there."""

    rows: ArticleRows
    """Where each row is, and which texts wait."""
    memory: Memory
    """What the rows carry."""
    scores: TokenScores
    """What was scored so far."""
    fallbacks: list[int]
    """Of each text."""
    recorder: CurveRecorder | None
    """What takes notes, if anything does."""
    seconds: float = 0.0
    """That were spent so far."""

    def tree(self) -> dict[str, Any]:
        """All of it as tensors and plain values; no token is left for the caches to score."""
        memory = self.memory
        for place, cache in zip(self.rows.positions, memory.caches, strict=True):
            self.scores.settle(place, cache)
        return {
            "positions": [list(position) for position in self.rows.positions],
            "entered": self.rows.entered,
            "state": memory.state,
            "fast": memory.fast,
            "rule_state": memory.rule_state,
            "caches": [None if cache is None else cache.pairs for cache in memory.caches],
            "scores": self.scores.tree(),
            "fallbacks": self.fallbacks,
            "curves": None if self.recorder is None else self.recorder.state(),
            "seconds": self.seconds,
        }

    def restore(self, tree: Mapping[str, Any], device: torch.device) -> None:
        """Puts back what `tree` gave, but for the places of the rows and the fallbacks."""
        memory = self.memory
        there = {name: tree[name] for name in ("state", "fast", "rule_state", "caches")}
        there = transform(there, lambda tensor: tensor.to(device))
        memory.state = formed(memory.state, there["state"])
        memory.fast = formed(memory.fast, there["fast"])
        memory.rule_state = formed(memory.rule_state, there["rule_state"])
        for cache, pairs in zip(memory.caches, there["caches"], strict=True):
            if cache is not None:
                cache.restore(*pairs)
        self.scores.restore(tree["scores"])
        if self.recorder is not None:
            self.recorder.restore(tree["curves"])
        self.seconds = tree["seconds"]


class TokenScores:
    """Token scores, put in their places as the rows go on.

    Args:
        texts: what is read.
        thetas: flatnesses of the cache; none for no cache.
        loss: says what else is asked for.
    """

    _PARTS = ("nats", "cache", "confidence", "tempered")

    def __init__(
        self, texts: Sequence[NDArray[np.int32]], thetas: Sequence[float], loss: SegmentLoss
    ) -> None:
        self.nats: list[NDArray[np.float64]] = [np.full(len(text), np.nan) for text in texts]
        self.cache: list[NDArray[np.float64]] = []
        self.thetas = torch.tensor(thetas, dtype=torch.float64)
        if thetas:
            self.cache = [np.full((len(thetas), len(text)), np.nan) for text in texts]
        self.confidence: list[NDArray[np.float32]] = []
        if loss.confidence:
            numbers = 2 + (2 * len(thetas) + 2 if thetas else 0)
            self.confidence = [
                np.full((numbers, len(text)), np.nan, dtype=np.float32) for text in texts
            ]
        self.tempered: list[NDArray[np.float64]] = []
        if loss.temperatures:
            self.tempered = [np.full((len(loss.temperatures), len(text)), np.nan) for text in texts]

    def keep(
        self,
        places: Sequence[tuple[int, int]],
        batch: SegmentBatch,
        score: SegmentScore,
        caches: Sequence[CacheMemory | None],
    ) -> tuple[int, float]:
        """Writes the scores of one segment; returns how many, and their sum in nats."""
        time = len(batch.targets)
        counts = [min(time, len(self.nats[text]) - start) for text, start in places]
        nats = score.nats.double().cpu().numpy()
        sure = None if score.confidence is None else score.confidence.float().cpu().numpy()
        tempered = None if score.tempered is None else score.tempered.double().cpu().numpy()
        together = asked_together(score.nats.device)
        for row, ((text, start), count) in enumerate(zip(places, counts, strict=True)):
            now = slice(start, start + count)
            self.nats[text][now] = nats[:count, row]
            if sure is not None:
                self.confidence[text][:2, now] = sure[:, :count, row]
            if tempered is not None:
                self.tempered[text][:, now] = tempered[:, :count, row]
            cache = caches[row]
            if cache is not None:
                cache.wait(score.features[:count, row], batch.targets[:count, row])
                end = start + count
                if cache.waiting >= together or end == len(self.nats[text]):
                    self.settle((text, end), cache)
        return sum(counts), float(nats.sum())

    def settle(self, place: tuple[int, int], cache: CacheMemory | None) -> None:
        """Scores the tokens of a row that its cache has not been asked for yet.

        Args:
            place: the row's text, and how many of its tokens were read.
            cache: of the row; None for no cache.
        """
        if cache is None or not cache.waiting:
            return
        text, end = place
        now = slice(end - cache.waiting, end)
        found = cache.score_waiting(self.thetas, confidence=bool(self.confidence))
        self.cache[text][:, now] = found.log_probabilities.double().cpu().numpy()
        if self.confidence:
            self.confidence[text][2:, now] = found.confidence.float().cpu().numpy()

    def so_far(self) -> tuple[int, float]:
        """How many tokens were scored, and the sum of their losses in nats."""
        scored = [text[~np.isnan(text)] for text in self.nats]
        return sum(map(len, scored)), float(sum(text.sum() for text in scored))

    def tree(self) -> dict[str, list[Tensor]]:
        """Everything as tensors."""
        return {
            name: [torch.from_numpy(text) for text in getattr(self, name)] for name in self._PARTS
        }

    def restore(self, tree: Mapping[str, Sequence[Tensor]]) -> None:
        """Puts back what `tree` gave."""
        for name in self._PARTS:
            setattr(self, name, [text.numpy() for text in tree[name]])
