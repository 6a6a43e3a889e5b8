"""A walk over settings: one setting at a time by a factor, as long as the perplexity falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

from metalm.language.reading.methods import STEPS
from metalm.language.tuning.trials import Settings, Trial

# A step must lower the perplexity by two in ten thousand: far less than the text's own noise.
_ENOUGH = 1 - 2e-4

Evaluate = Callable[[Sequence[Settings]], Sequence[Trial]]
"""Reads the tuning text once with each of several settings."""


def search(
    evaluate: Evaluate,
    start: Settings,
    steps: Mapping[str, float] = STEPS,
    *,
    halvings: int = 1,
    ahead: bool = False,
    known: Iterable[Trial] = (),
    goal: Callable[[Trial], float] = attrgetter("perplexity"),
) -> list[Trial]:
    """Walks from `start` to settings that no single step of any setting makes better by 0.02 %.

    Args:
        evaluate: reads the tuning text.
        start: where to begin.
        steps: factor by which each setting moves; halved (its square root) after a round without
            gain.
        halvings: how often the factors are halved.
        ahead: try all neighbours at once before each round, where that is cheaper than one by one;
            the walk is the same.
        known: trials that need not be repeated.
        goal: what should fall.

    Returns:
        Every new trial, in order.
    """
    trials = {_rounded(trial.settings): trial for trial in known}
    num_known = len(trials)

    def try_these(several: Sequence[Settings]) -> None:
        new = dict.fromkeys(key for key in map(_rounded, several) if key not in trials)
        trials.update(zip(new, evaluate([dict(key) for key in new]) if new else [], strict=True))

    def value(settings: Settings) -> float:
        try_these([settings])
        return goal(trials[_rounded(settings)])

    current = dict(start)
    for halving in range(halvings + 1):
        factors = {name: steps[name] ** 0.5**halving for name in start}
        while True:
            if ahead:
                try_these([current, *_neighbours(current, factors)])
            after = _round(value, current, factors)
            if after == current:
                break
            current = after
    return list(trials.values())[num_known:]


def _rounded(settings: Settings) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, float(f"{number:.6g}")) for name, number in settings.items()))


def _neighbours(settings: Settings, factors: Settings) -> list[Settings]:
    return [
        {**settings, name: settings[name] * direction}
        for name, factor in factors.items()
        for direction in (factor, 1 / factor)
    ]


def _round(
    value: Callable[[Settings], float], settings: Settings, factors: Settings
) -> dict[str, float]:
    """Moves each setting in turn, up or down by its factor as long as the value falls enough."""
    current = dict(settings)
    for name, factor in factors.items():
        for direction in (factor, 1 / factor):
            best = value(current)
            while value({**current, name: current[name] * direction}) < best * _ENOUGH:
                current[name] *= direction
                best = value(current)
    return current
