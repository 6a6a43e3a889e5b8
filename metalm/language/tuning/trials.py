"""Trials of settings on the tuning text, and the best among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metalm.language.reading.cache import CacheConfig

Settings = Mapping[str, float]
"""Numbers of an update rule, by name."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One reading of the tuning text."""

    segment: int
    """Tokens between two updates."""
    settings: Settings
    """Of the update rule."""
    perplexity: float
    """Per word, without a cache."""
    cached_perplexity: float
    """Per word, with the best cache of the grid."""
    cache: CacheConfig
    """That cache."""
    seconds: float
    """How long the reading took."""
    multiples: tuple[float, ...] = (1.0,)
    """What multiplies the rate in each fast copy (see `Method`)."""


class BegunTrials:
    """Trials of searches that are not done, so that a search that was stopped can go on.

    Args:
        trials: name of a search -> its trials so far.
        keep: told all of them whenever they change; None keeps nothing.
    """

    def __init__(
        self,
        trials: Mapping[str, Sequence[Trial]] | None = None,
        keep: Callable[[dict[str, list[Trial]]], None] | None = None,
    ) -> None:
        self._trials = {name: list(of_name) for name, of_name in (trials or {}).items()}
        self._keep = keep

    def of(self, name: str) -> tuple[Trial, ...]:
        """The trials of one search."""
        return tuple(self._trials.get(name, ()))

    def add(self, name: str, trial: Trial) -> None:
        """Keeps one more."""
        self._trials.setdefault(name, []).append(trial)
        self._tell()

    def done(self, name: str) -> None:
        """Forgets those of a search that is done."""
        if self._trials.pop(name, None):
            self._tell()

    def _tell(self) -> None:
        if self._keep is not None:
            self._keep(self._trials)


def choose_settings(
    trials: Sequence[Trial], *, cached: bool, segment: int | None = None, copies: int = 1
) -> Trial:
    """The best trial of so many copies, with or without a cache, at one segment length or at any.

    Raises:
        ValueError: there is no such trial.
    """
    among = [
        trial
        for trial in trials
        if segment in (None, trial.segment) and len(trial.multiples) == copies
    ]
    if not among:
        raise ValueError(
            f"no trial to choose from; expected one of {copies} fast copies"
            + (f" at segments of {segment}" if segment is not None else "")
            + f", found none among {len(trials)}; tune again"
        )
    return min(among, key=lambda t: t.cached_perplexity if cached else t.perplexity)


def trial_to_json(trial: Trial) -> dict[str, Any]:
    """A trial as JSON values."""
    return {
        "segment": trial.segment,
        "settings": dict(trial.settings),
        "perplexity": trial.perplexity,
        "cached_perplexity": trial.cached_perplexity,
        "cache": {
            "theta": trial.cache.theta,
            "share": trial.cache.share,
            "window": trial.cache.window,
        },
        "seconds": round(trial.seconds, 2),
        "multiples": list(trial.multiples),
    }


def trial_from_json(value: Mapping[str, Any]) -> Trial:
    """The inverse of `trial_to_json`.

    Raises:
        KeyError, TypeError, ValueError: these are not the JSON values of a trial.
    """
    return Trial(
        segment=int(value["segment"]),
        settings={str(name): float(number) for name, number in dict(value["settings"]).items()},
        perplexity=float(value["perplexity"]),
        cached_perplexity=float(value["cached_perplexity"]),
        cache=CacheConfig(**value["cache"]),
        seconds=float(value["seconds"]),
        multiples=tuple(float(number) for number in value.get("multiples", (1.0,))),
    )
