"""The recipes of the two trainings of a rule, and the rule that they begin with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from metalm.adapt.token_losses import check_surprise
from metalm.language.network.model import LanguageModel
from metalm.language.reading.methods import ALL_BUT_RECURRENT, STARTS
from metalm.meta.forward_mode import with_forward_mode
from metalm.meta.meta_gradient import Mode
from metalm.meta.parameters import Parameters, choose, split
from metalm.meta.rules.kinds import LearnedRule, RuleKind, known_settings, learned_rule
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.training.checked_settings import refuse_below, refuse_outside


@dataclass(frozen=True, kw_only=True)
class MetaTrainingConfig:
    """What the two trainings of the rule have in common."""

    SECTION: ClassVar[str]
    """Its name on the command line."""
    LEAST_TOKENS: ClassVar[int] = 1
    tokens: int
    """Tokens read."""
    rows: int
    """Articles read at once, each with its own fast weights."""
    unroll: int
    """Updates through which the meta-gradient goes."""
    learning_rate: float
    """Highest of Adam, under one cycle, for the rule's parameters (most of them logarithms)."""
    segment: int = 20
    """Tokens between two updates of the fast weights."""
    checkpoint_every: int | Literal["auto", "least"] = 0
    """Keep the fast weights at every so many updates and recompute the rest; 0 keeps all, "auto"
    recomputes two thirds of the updates at most, "least" keeps what needs least memory."""
    clip: float = 1.0
    """Highest norm of the rule's meta-gradient."""
    order: Literal[1, 2] = 1
    """Of the meta-gradient: 1 holds the inner gradients constant, 2 is exact, through them."""
    mode: Mode = "reverse"
    """"forward" carries the meta-gradient of order 1 along, through the whole article so far."""
    bfloat16: bool = True
    """Matrix products in bfloat16 where the hardware has it; everything else in float32."""
    surprise: float = 0.0
    """Power of its loss by which a token weighs in what is learnt from while reading. The weights
    are held constant at both orders, and what counts is the unweighted loss. More time and memory
    than without."""
    carry_rows: int = 0
    """Rows that read on from one article into the next, as the carry-on mode does: they keep their
    hidden states and fast weights. All others begin every article from W_0."""

    def __post_init__(self) -> None:
        """Checks that the parts of the recipe fit."""
        refuse_below(self, self.SECTION, "tokens", least=self.LEAST_TOKENS)
        refuse_below(self, self.SECTION, "rows", "segment")
        refuse_outside(self, self.SECTION, "learning_rate", "clip", high=math.inf)
        if not 0 <= self.carry_rows <= self.rows:
            raise ValueError(
                "rows that carry on are some of the rows; expected carry_rows from 0 to rows, that "
                f"is {self.rows}, found {self.carry_rows}; do change one of them"
            )
        if self.order not in (1, 2) or self.mode not in ("reverse", "forward"):
            raise ValueError(
                "unknown meta-gradient; expected order 1 or 2 and mode 'reverse' or 'forward', "
                f"found order {self.order} and mode {self.mode!r}; do change them"
            )
        if self.mode == "forward" and (self.order == 2 or self.checkpoint_every):
            raise ValueError(
                "forward mode has order 1 and needs no checkpoints; expected order 1 and "
                f"checkpoint_every 0, found {self.order} and {self.checkpoint_every}; do change "
                "them, or use mode 'reverse'"
            )
        check_surprise(self.surprise)
        if self.mode == "forward" and self.surprise:
            raise ValueError(
                "forward mode learns from what counts; expected surprise 0, found "
                f"{self.surprise}; do change it, or use mode 'reverse'"
            )
        least = 1 if self.mode == "forward" else 2
        if self.unroll < least:
            raise ValueError(
                f"an unroll of {self.unroll} trains no rule, since a segment is "
                "scored before it is learnt from and no score comes after the last update; "
                f"expected unroll >= {least} in mode {self.mode!r}, found {self.unroll}; do raise "
                "unroll, or use mode 'forward', which looks further back"
            )


@dataclass(frozen=True, kw_only=True)
class RuleTrainingConfig(MetaTrainingConfig):
    """Training of the rule with the model frozen, on articles that the base has not read."""

    SECTION = "rule"
    tokens: int = 200_000
    """Tokens read."""
    rows: int = 8
    """Articles read at once, each with its own fast weights."""
    unroll: int = 16
    """Updates through which the meta-gradient goes."""
    learning_rate: float = 0.03
    """Highest of Adam, under one cycle, for the rule's parameters (most of them logarithms)."""
    adapt: tuple[str, ...] = ALL_BUT_RECURRENT
    """Patterns of the parameters that become fast, in both trainings."""
    granularity: Literal["tensor", "row", "coordinate"] = "row"
    """What has a rate and a decay of its own; a row of the embedding is a token."""
    kind: RuleKind = "rates"
    """Of rule, in both trainings: learned rates alone, or with a network or momentum on top."""
    hidden: int = 0
    """Units of the network; 0 for what the kind has by itself."""
    sees: tuple[str, ...] = ()
    """What the gates see, by name (`metalm/meta/rules/gated.py` lists it); none named for all."""

    def __post_init__(self) -> None:
        """Checks that there is such a rule, and that it can be trained so."""
        super().__post_init__()
        refuse_impossible(self, self.mode)


@dataclass(frozen=True, kw_only=True)
class JointTrainingConfig(MetaTrainingConfig):
    """Training of the rule and W_0 together, on all training articles."""

    SECTION = "joint"
    LEAST_TOKENS = 0
    tokens: int = 3_000_000
    """Tokens read; the control of the base reads as many. 0 leaves both at the base: what is
    compared then are ways to read with the same weights."""
    rows: int = 16
    """Articles read at once, each with its own fast weights."""
    unroll: int = 8
    """Updates through which the meta-gradient goes."""
    learning_rate: float = 0.001
    """Highest of Adam, under one cycle, for the rule; low, since the base has memorised most of
    these articles."""
    model_learning_rate: float = 5e-3
    """Highest rate of the schedule that W_0 goes on under (see the base)."""
    model_clip: float = 0.25
    """Highest norm of the meta-gradient of W_0."""
    dropout: bool = True
    """Whether the model reads with its dropout."""

    def __post_init__(self) -> None:
        """Checks the numbers of W_0 besides."""
        super().__post_init__()
        refuse_outside(self, self.SECTION, "model_learning_rate", "model_clip", high=math.inf)


def starting_rule(rms: Parameters, config: RuleTrainingConfig, seed: int = 0) -> LearnedRule:
    """The rule before training: Krause's, with the settings at which the search for his begins.

    Every kind takes the same steps until it has learned something.

    Args:
        rms: RMS of the training set's gradients, for each tensor that adapts.
        config: says what kind of rule it is, and what has a rate of its own.
        seed: of the numbers that a network starts with.

    Raises:
        ValueError: A kind that does not exist, or a setting that it does not have.
    """
    mean = float(sum(tensor.mean() for tensor in rms.values()) / len(rms))
    start = STARTS["rms"]
    rates = LearnedRates.from_krause(
        rms, start["rate"], start["decay"], start["eps"] * mean, config.granularity
    )
    settings: dict[str, Any] = {}
    if "seed" in known_settings(config.kind):
        settings["seed"] = seed
    if config.hidden:
        settings["hidden"] = config.hidden
    if config.sees:
        settings["sees"] = config.sees
    return learned_rule(config.kind, rates, settings)


def refuse_impossible(config: RuleTrainingConfig, mode: Mode) -> None:
    """Makes the rule for a single weight, to see whether it exists and has this mode.

    Raises:
        ValueError: What `starting_rule` refuses, or a kind without forward mode.
    """
    rule = starting_rule({"weight": torch.ones(1)}, config)
    if mode == "forward":
        with_forward_mode(rule)


def empty_rule(
    model: LanguageModel, config: RuleTrainingConfig, names: Iterable[str] | None = None
) -> LearnedRule:
    """A rule of the form that a training has, for trained numbers to be put into.

    Args:
        model: whose weights adapt; only their shapes matter.
        config: of the training.
        names: the fast weights; by default those that the configuration's patterns choose.
    """
    slow, _ = split(model, list(choose(model, config.adapt) if names is None else names))
    return starting_rule({name: torch.ones_like(weight) for name, weight in slow.items()}, config)
