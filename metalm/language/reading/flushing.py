"""Fast weights that go back to W_0 where the text says that a new article has begun."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.language.reading.article_starts import WINDOW, ArticleStarts, windows_of
from metalm.language.text.vocabulary import END_OF_LINE
from metalm.meta.parameters import Parameters
from metalm.meta.update_rule import AbstractUpdateRule, Coefficients, RuleState


class FlushState(NamedTuple):
    """What a row carries."""

    flush: Tensor
    """Whether an article has just begun, bool [rows]."""
    before: Tensor
    """The last tokens, int64 [rows, WINDOW - 1]; ends of line at first."""
    inner: RuleState
    """What the inner rule carries."""


class Flushing(AbstractUpdateRule):
    """The step of another rule, from W_0 in rows where an article has just begun.

        W <- inner(W_0 if begun else W, g)

    Nothing but the text, which has been scored by then, tells where an article begins
    (`article_starts.py`). The flush of Wolf, Chaumond, Delangue 2018 is a gate of each coordinate,
    which sees gradient and weight (`metalm.meta.rules.gated`); such gates do not find the place
    (EXPERIMENTS.md).

    For reading: the network is not learned through the updates. The loss must keep the tokens of a
    step (``aux.tokens``, int64 [time, rows]).

    Args:
        inner: Any rule.
        starts: Tells where articles begin.
        rows: Whether fast tensors have rows; else [rows] is left out of every shape here.
    """

    def __init__(
        self, inner: AbstractUpdateRule, starts: ArticleStarts, *, rows: bool = True
    ) -> None:
        super().__init__()
        self.inner, self.starts, self.rows = inner, starts, rows

    def initial_state(self, fast: Parameters) -> FlushState:
        """No token was read yet."""
        weight = next(iter(fast.values()))
        rows = weight.shape[:1] if self.rows else torch.Size()
        return FlushState(
            torch.zeros(rows, dtype=torch.bool, device=weight.device),
            torch.full((*rows, WINDOW - 1), END_OF_LINE, device=weight.device),
            self.inner.initial_state(fast),
        )

    def coefficients(self) -> Coefficients:
        """Those of the inner rule."""
        return self.inner.coefficients()

    def observe(self, state: FlushState, losses: Tensor, aux: Any = None) -> FlushState:
        """Look at the tokens of the step."""
        flush, before, inner = state
        tokens = torch.cat((before.movedim(-1, 0), aux.tokens))
        flush = (self.starts(windows_of(tokens)) > 0).any(0)
        before = tokens[1 - WINDOW :].movedim(0, -1).contiguous()
        return FlushState(flush, before, self.inner.observe(inner, losses, aux))

    def forward(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: FlushState,
        coefficients: Coefficients = None,
    ) -> tuple[Parameters, FlushState]:
        """One step, out of place; see `AbstractUpdateRule.forward`."""
        flush, before, inner = state
        kept = {
            name: torch.where(_beside(flush, weight), slow[name], weight)
            for name, weight in fast.items()
        }
        new, inner = self.inner(kept, gradients, slow, inner, coefficients)
        return new, FlushState(flush, before, inner)

    @torch.no_grad()
    def update_(
        self,
        fast: Parameters,
        gradients: Parameters,
        slow: Parameters,
        state: FlushState,
        coefficients: Coefficients = None,
    ) -> FlushState:
        """The same step in place; see `AbstractUpdateRule.update_`."""
        flush, before, inner = state
        if flush.is_cuda:  # one more pass over memory, which no processor waits for
            for name, weight in fast.items():
                torch.where(_beside(flush, weight), slow[name], weight, out=weight)
        else:
            for place in flush.nonzero().tolist():  # [row], or [] for the whole tensor
                for name, weight in fast.items():
                    weight[tuple(place)] = slow[name]
        inner = self.inner.update_(fast, gradients, slow, inner, coefficients)
        return FlushState(flush, before, inner)


def _beside(flush: Tensor, weight: Tensor) -> Tensor:
    return flush.view(*flush.shape, *(1,) * (weight.dim() - flush.dim()))
