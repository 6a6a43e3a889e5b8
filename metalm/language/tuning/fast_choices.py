"""Which weights of a language model are fast, whole or as low-rank changes, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch

from metalm.language.network.model import LanguageModel
from metalm.language.reading.methods import ALL_BUT_RECURRENT
from metalm.language.text.articles import ArticleSet
from metalm.language.training.statistics import gradient_rms
from metalm.meta.low_rank import Basis, LowRank
from metalm.meta.parameters import Parameters, choose, split

Factors = Literal["both", "left"]
_LEFT, _RIGHT = ".left", ".right"


@dataclass(frozen=True, kw_only=True)
class FastChoice:
    """Some weights of a model, by name."""

    name: str
    """What tables call it."""
    patterns: tuple[str, ...] = ALL_BUT_RECURRENT
    """Of the parameters that adapt, as `choose` takes them."""
    rank: int = 0
    """Of the change U V of each chosen matrix, where only U and V are fast; 0 for whole matrices.
    Vectors are always fast as they are.
    """
    basis: Basis = "random"
    """Where V starts (`LowRank`)."""
    factors: Factors = "both"
    """Whether U and V are fast, or U (left) alone, V staying where it starts."""

    def of(self, model: LanguageModel) -> FastModel:
        """The model in the form in which these weights can be fast.

        Raises:
            ValueError: a pattern without a match, or a rank that does not fit a chosen matrix.
        """
        names = choose(model, self.patterns)
        own = dict(model.named_parameters())
        if self.rank == 0:
            size = _bytes_of(model, names)
            return FastModel(model, names, size, 2 * size)
        matrices = [name for name in names if own[name].dim() > 1]
        vectors = [f"module.{name}" for name in names if own[name].dim() == 1]
        low = LowRank(model, matrices, self.rank, self.basis)
        stand_in = cast(LanguageModel, low)  # it has all that a reader asks a model for
        factors = "factors.*" if self.factors == "both" else f"factors.*{_LEFT}"
        fast = choose(low, [factors, *vectors])
        size = _bytes_of(stand_in, fast)
        return FastModel(stand_in, fast, size, 2 * size + 2 * _bytes_of(model, matrices))


class FastModel(NamedTuple):
    """A model, and what of it is fast."""

    model: LanguageModel
    """The model itself, or a `LowRank` that stands in for it."""
    names: tuple[str, ...]
    """Of the fast parameters."""
    bytes_kept: int
    """Of an article's fast weights, from segment to segment."""
    bytes_at_work: int
    """Of an article while it learns from a segment: fast weights and their gradients, and of
    low-rank changes also the sums W_0 + U V and theirs.
    """


WHOLE = (
    FastChoice(name="embedding and output bias", patterns=("embedding.*", "decoder.*")),
    FastChoice(name="recurrent layers", patterns=("layers.*",)),
    FastChoice(name="all but recurrent weights"),
    FastChoice(name="everything", patterns=("*",)),
)
"""Choices of whole tensors. Input and output embedding are one tensor."""


def low_rank_choices(
    ranks: Sequence[int], bases: Sequence[Basis], factors: Sequence[Factors] = ("both",)
) -> tuple[FastChoice, ...]:
    """Low-rank changes of what adapts by default."""
    names = {"both": "", "left": ", U alone"}
    return tuple(
        FastChoice(
            name=f"rank {rank}, {basis} basis{names[which]}", rank=rank, basis=basis, factors=which
        )
        for rank in ranks
        for basis in bases
        for which in factors
    )


def fast_rms(fast: FastModel, articles: ArticleSet, segment: int, batches: int) -> Parameters:
    """RMS of the gradients of what is fast, on training text (`gradient_rms`).

    V has no gradient at W_0, where U is zero, but has one as soon as a text is read: the mean RMS
    of its U stands for its own, so that a rule that divides by it moves both alike, as SGD does.

    Args:
        fast: what is fast, of which model.
        articles: training text.
        segment: tokens of each row in a batch.
        batches: how many are counted.
    """
    rms = gradient_rms(fast.model, articles, fast.names, segment, batches=batches)
    return {
        name: torch.full_like(own, float(rms[name.removesuffix(_RIGHT) + _LEFT].mean()))
        if name.endswith(_RIGHT)
        else own
        for name, own in rms.items()
    }


def _bytes_of(model: LanguageModel, names: Sequence[str]) -> int:
    chosen, _ = split(model, names)
    return sum(weight.numel() * weight.element_size() for weight in chosen.values())
