"""The kinds of learned rules by name; each starts as learned rates and takes the same steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from metalm.meta.rules.coordinate_lstm import CoordinateLSTM
from metalm.meta.rules.gated import Gated
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.momentum import Momentum

RuleKind = Literal["rates", "gated", "lstm", "momentum"]
"""Names for `learned_rule`."""

LearnedRule = LearnedRates | Gated | CoordinateLSTM | Momentum
"""What the trainings train; all have ``names``, ``rate_scale`` and ``decay_scale``."""

_BUILDERS: dict[str, Callable[..., LearnedRule]] = {
    "gated": Gated,
    "lstm": CoordinateLSTM,
    "momentum": Momentum,
}


def learned_rule(
    kind: RuleKind, rates: LearnedRates, settings: Mapping[str, Any] | None = None
) -> LearnedRule:
    """A rule of this kind that starts as these learned rates.

    Args:
        kind: "rates" for the learned rates themselves, "gated" for `Gated`, "lstm" for
            `CoordinateLSTM`, "momentum" for `Momentum`.
        rates: Made from the gradient statistics.
        settings: What the rule takes beside its rates, such as ``hidden``.

    Raises:
        ValueError: A kind that does not exist, or a setting that the kind does not have.
    """
    settings = settings or {}
    known = known_settings(kind)
    for name in settings:
        if name not in known:
            raise ValueError(
                f"a rule of kind {kind!r} has no setting {name!r}; expected "
                f"{', '.join(known) or 'none'}, found {name!r}; do leave it out"
            )
    return rates if kind == "rates" else _BUILDERS[kind](rates, **settings)


def known_settings(kind: RuleKind) -> list[str]:
    """What rules of this kind take beside their rates.

    Raises:
        ValueError: A kind that does not exist.
    """
    if kind == "rates":
        return []
    if kind not in _BUILDERS:
        raise ValueError(
            f"unknown kind of rule; expected 'rates', {', '.join(map(repr, _BUILDERS))}, found "
            f"{kind!r}; do change it"
        )
    return [*inspect.signature(_BUILDERS[kind]).parameters][1:]
