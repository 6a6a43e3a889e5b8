"""Long-term memory: articles read one after the other, each consolidated into W_0 when it ends.

An article is scored, segment by segment, with fast weights that begin at W_0; only when all of it
has been scored does W_0 move (`metalm.meta.consolidation`). The next article begins there, with a
fresh hidden state. What W_0 has become can be saved, and any text re-read with it, learning or not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.adapt.reading_state import checksum
from metalm.language.network.model import LanguageModel
from metalm.language.reading.curves import CurveRecorder, Curves
from metalm.language.reading.reader import Reader
from metalm.meta.consolidation import consolidate, relative_fisher
from metalm.meta.parameters import Parameters, split
from metalm.meta.update_rule import AbstractUpdateRule, RuleState
from metalm.training import checkpoint

_KIND = "metalm-long-term-memory-1"


@dataclass(frozen=True, kw_only=True)
class ConsolidationConfig:
    """How far W_0 follows what was read, and how firmly it is held."""

    share: float = 0.3
    """Of the way from W_0 to where an article's fast weights ended; 0 keeps nothing."""
    elasticity: float = 1.0
    """Of the pull home, on a coordinate of mean Fisher information; 0 for none."""


class LongTermMemory:
    """The slow weights that move, and what holds them.

    Args:
        model: home, the weights as they were trained; not changed.
        fisher: of the training set (`training_fisher`), for the parameters that are to move.
        config: how they move.

    Raises:
        ValueError: this is no Fisher information.
    """

    def __init__(
        self, model: LanguageModel, fisher: Mapping[str, Tensor], config: ConsolidationConfig
    ) -> None:
        self.config = config
        self.fisher = relative_fisher(fisher)
        home, _ = split(model, tuple(fisher))
        self.home: Parameters = {name: weight.detach().clone() for name, weight in home.items()}
        self.slow: Parameters = {name: weight.clone() for name, weight in self.home.items()}
        self.num_articles = 0
        self._model_checksum = checksum(model)

    def keep(self, fast: Mapping[str, Tensor]) -> None:
        """Consolidates an article whose fast weights, each [*shape], ended here."""
        share, elasticity = self.config.share, self.config.elasticity
        fast = {name: fast[name] for name in self.slow}
        self.slow = consolidate(self.slow, fast, self.home, self.fisher, share, elasticity)
        self.num_articles += 1

    def moved(self) -> float:
        """||W_0 - H|| / ||H|| over all tensors that move: how far W_0 is from home."""
        away = [self.slow[name] - home for name, home in self.home.items()]
        squares = (
            sum(float(tensor.double().square().sum()) for tensor in tensors)
            for tensors in (away, self.home.values())
        )
        return math.sqrt(next(squares) / next(squares))

    def model(self, model: LanguageModel) -> LanguageModel:
        """A copy of the model with W_0 as it is now."""
        moved = copy.deepcopy(model)
        _write(moved, self.slow)
        return moved

    def save(self, path: Path | str) -> None:
        """Writes W_0 and how it moves; home is the model's file."""
        tensors = {f"slow.{name}": weight for name, weight in self.slow.items()}
        tensors |= {f"fisher.{name}": weight for name, weight in self.fisher.items()}
        meta = {
            "kind": _KIND,
            "model": self._model_checksum,
            "num_articles": self.num_articles,
            "config": asdict(self.config),
        }
        checkpoint.save(Path(path), tensors, meta)

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel) -> LongTermMemory:
        """Reads a memory that `save` wrote.

        Args:
            path: the file.
            model: the one that the memory began from.

        Raises:
            ValueError: no such file, a damaged one, another kind of file, or another model.
        """
        tensors, meta = checkpoint.load(Path(path))
        if meta.get("kind") != _KIND:
            raise ValueError(
                f"{path} is no long-term memory; expected the kind {_KIND!r}, found "
                f"{meta.get('kind')!r}; pass a file that LongTermMemory.save wrote"
            )
        if meta["model"] != checksum(model):
            raise ValueError(
                f"{path} began from other weights; expected the checksum {checksum(model)[:16]}, "
                f"found {meta['model'][:16]}; load the model that it was saved with"
            )
        device = model.embedding.weight.device
        parts: dict[str, Parameters] = {"slow": {}, "fisher": {}}
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor.to(device)
        memory = cls(model, parts["fisher"], ConsolidationConfig(**meta["config"]))
        memory.slow, memory.fisher = parts["slow"], parts["fisher"]
        memory.num_articles = int(meta["num_articles"])
        return memory


def read_in_succession(
    model: LanguageModel,
    rule: AbstractUpdateRule,
    segment: int,
    texts: Sequence[NDArray[np.int32]],
    memory: LongTermMemory,
    progress: Callable[[int, NDArray[np.float64]], None] | None = None,
) -> list[NDArray[np.float64]]:
    """Reads texts one after the other; W_0 of each is what the memory became with those before.

    Args:
        model: as it was trained; not changed. The parameters that the memory holds are fast.
        rule: how it learns within a text.
        segment: tokens between two updates.
        texts: token ids of each.
        memory: changed with every text, after all of it has been scored.
        progress: told each text's number and losses.

    Returns:
        Minus log probability of every token of every text, in nats.
    """
    moving = memory.model(model)
    reader = Reader(moving, rule, tuple(memory.slow), segment)
    nats = []
    for number, text in enumerate(texts):
        last = _LastWeights()
        readings = reader.read([text], recorder=last)
        memory.keep(last.fast)
        _write(moving, memory.slow)
        nats.append(readings.nats[0])
        if progress is not None:
            progress(number, readings.nats[0])
    return nats


class _LastWeights(CurveRecorder):
    """Keeps the fast weights of the one row that is read, as they are after the last update."""

    def __init__(self) -> None:
        self.fast: Parameters = {}

    def note(self, places: Sequence[tuple[int, int]], fast: Parameters, state: RuleState) -> None:
        """Remembers where they are; they may be overwritten until the reading ends."""
        del places, state
        self.fast = {name: weight[0] for name, weight in fast.items()}

    def curves(self) -> list[Curves]:
        """None: only the end counts."""
        return []


@torch.no_grad()
def _write(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Puts these numbers into the model's own parameters of these names."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)
