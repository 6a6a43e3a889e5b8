"""Settings that would fail late, hours into a run, are refused when they are set."""

from __future__ import annotations

from typing import Any


def refuse_below(settings: Any, section: str, *names: str, least: float = 1) -> None:
    """Checks that these settings, or all numbers of one that has several, are at least so much.

    Raises:
        ValueError: one is lower; the message names it as the command line does.
    """
    for name in names:
        numbers = _numbers(settings, name)
        if any(not number >= least for number in numbers):
            raise ValueError(
                f"{_named(section, name)} is too low; expected at least {least:g}, found "
                f"{', '.join(map(str, numbers))}; do raise it"
            )


def refuse_empty(settings: Any, section: str, *names: str) -> None:
    """Checks that each of these settings names something.

    Raises:
        ValueError: one of them is empty.
    """
    for name in names:
        if not getattr(settings, name):
            raise ValueError(
                f"{_named(section, name)} is empty; expected one value or more, found none; do "
                "give some, or leave the option out"
            )


def refuse_outside(
    settings: Any, section: str, *names: str, low: float = 0.0, high: float = 1.0
) -> None:
    """Checks that low <= setting < high, or that of all its numbers.

    Raises:
        ValueError: one lies outside.
    """
    for name in names:
        numbers = _numbers(settings, name)
        if any(not low <= number < high for number in numbers):
            raise ValueError(
                f"impossible {_named(section, name)}; expected {low:g} <= {name} < {high:g}, found "
                f"{', '.join(map(str, numbers))}; do change it"
            )


def _named(section: str, name: str) -> str:
    """As the command line has it; a setting of no section by itself."""
    return f"{section}.{name}" if section else name


def _numbers(settings: Any, name: str) -> tuple[Any, ...]:
    value = getattr(settings, name)
    return value if isinstance(value, tuple) else (value,)
