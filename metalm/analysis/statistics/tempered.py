"""The same split scored once more, each method under a temperature chosen on validation text."""

from __future__ import annotations

from dataclasses import dataclass

from metalm.analysis.statistics.bootstrap import Interval, gain
from metalm.analysis.statistics.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Tempered:
    """Methods under temperatures of their own; those without one are not there."""

    temperatures: dict[str, float]
    """Method -> what its logits are divided by."""
    scores: Scores
    """Nats of the same words under them."""


@dataclass(frozen=True, kw_only=True)
class TemperedRow:
    """One method's figures over a split."""

    method: str
    """Name of the method."""
    temperature: float
    """What its logits are divided by."""
    perplexity: float
    """Per word, under that temperature."""
    perplexity_at_1: float
    """Per word, under temperature 1."""
    gain: Interval | None
    """Nats per word saved against the baseline under its own temperature; None for a baseline."""


def tempered_rows(tempered: Tempered, scores: Scores) -> list[TemperedRow]:
    """One row a method.

    Args:
        tempered: under temperatures of their own.
        scores: under temperature 1.
    """
    own = tempered.scores
    return [
        TemperedRow(
            method=method,
            temperature=tempered.temperatures[method],
            perplexity=own.perplexity(method),
            perplexity_at_1=scores.perplexity(method),
            gain=gain(own, method) if own.baselines[method] != method else None,
        )
        for method in own.methods
    ]
