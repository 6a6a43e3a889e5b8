"""What is compared: a trained model, a way to learn while reading, and perhaps a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from metalm.language.network.model import LanguageModel
from metalm.language.reading.article_starts import ArticleStarts
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.flushing import Flushing
from metalm.meta.parameters import Parameters
from metalm.meta.rules.gradient_descent import GradientDescent
from metalm.meta.rules.kinds import LearnedRule
from metalm.meta.rules.rms_decay import RmsDecay
from metalm.meta.update_rule import AbstractUpdateRule

# All but the recurrent weights, whose products the rows of a batch then share: twice the speed, for
# little (EXPERIMENTS.md compares).
ALL_BUT_RECURRENT = ("embedding.*", "decoder.*", "*input_weight", "*_bias")

SURPRISE = "surprise"
"""The setting that belongs to the loss and not to the rule."""

ModelName = Literal["control", "joint"]
Learning = Literal["none", "sgd", "rms", "rule", "joint", "rms-flush", "joint-flush"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the comparison.

    The settings that a way of learning understands: `rate`, `decay` (sgd, rms), `eps` in units of
    the mean RMS (rms), `rate_scale` and `decay_scale` (rule, joint); and each of them `surprise`,
    the power by which a token's loss weighs it in what is learnt from, 0 where it is not named.
    """

    name: str
    """How tables and plots call it."""
    model: ModelName
    """Whose weights are W_0."""
    learning: Learning
    """none; dynamic evaluation by sgd or rms; the rule trained with W_0 frozen, or jointly with
    it; and two of them that go back to W_0 where an article begins.
    """
    segment: int
    """Tokens between two updates."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the update rule that are tuned on validation articles."""
    cache: CacheConfig | None = None
    """None for no cache."""
    multiples: tuple[float, ...] = (1.0,)
    """What multiplies the rate in each fast copy; several copies are mixed (`mixing.py`)."""
    learned_mixture: bool = False
    """Whether a network adjusts the weights of the mixture (`mixture_network.py`): of several
    copies, or of one and its cache."""

    @property
    def surprise(self) -> float:
        """See the settings."""
        return self.settings.get(SURPRISE, 0.0)

    def copies(self) -> list[Method]:
        """The method of each fast copy by itself, without a cache."""
        scale = RATES.get(between_flushes(self.learning), "")
        return [
            replace(
                self,
                settings={**self.settings, scale: self.settings[scale] * multiple}
                if multiple != 1.0
                else self.settings,
                cache=None,
                multiples=(1.0,),
                learned_mixture=False,
            )
            for multiple in self.multiples
        ]

    def with_(self, **changes: Any) -> Method:
        """The same method with other values."""
        return replace(self, **changes)


FLUSHED: Mapping[Learning, Learning] = {"rms-flush": "rms", "joint-flush": "joint"}
"""What learns between two flushes."""


def between_flushes(learning: Learning) -> Learning:
    """The way of learning, its flush left aside."""
    return FLUSHED.get(learning, learning)


# Where the search begins, for segments of 20. Rms: what Krause et al. publish for WikiText-2 (eta
# 3.1e-5 at segments of 5, lambda 1.4e-3), brought to 20, of that order; eps in units of the mean
# RMS, and both numbers of sgd, are guesses.
STARTS: Mapping[Learning, Mapping[str, float]] = {
    "sgd": {"rate": 0.5, "decay": 1e-3},
    "rms": {"rate": 2e-4, "decay": 1e-3, "eps": 0.7},
    "rule": {"rate_scale": 1.0, "decay_scale": 1.0},
    "joint": {"rate_scale": 1.0, "decay_scale": 1.0},
}

# By what factor the search moves each setting; rates equally for the rivals and for metalm.
STEPS: Mapping[str, float] = {
    "rate": 1.6,
    "decay": 4.0,
    "eps": 2.0,
    "rate_scale": 1.6,
    "decay_scale": 4.0,
    SURPRISE: 2.0,
}

# Which setting is the rate.
RATES: Mapping[Learning, str] = {
    "sgd": "rate",
    "rms": "rate",
    "rule": "rate_scale",
    "joint": "rate_scale",
}

NAMES: Mapping[Learning, str] = {
    "none": "static",
    "sgd": "dynamic evaluation (SGD)",
    "rms": "dynamic evaluation (RMS)",
    "rule": "metalm, W0 frozen",
    "joint": "metalm",
    "rms-flush": "dynamic evaluation (RMS), flushing",
    "joint-flush": "metalm, flushing",
}


@dataclass(frozen=True, kw_only=True)
class TrainedModels:
    """The weights that a run's stages left, and what its rules need."""

    models: Mapping[str, LanguageModel]
    """control and joint."""
    rules: Mapping[str, LearnedRule]
    """rule and joint."""
    rival_names: tuple[str, ...]
    """Parameters that dynamic evaluation adapts."""
    statistics: Mapping[int, Parameters]
    """Segment length -> RMS of the control's training gradients (for dynamic evaluation)."""
    surprises: Mapping[str, float] = field(default_factory=dict)
    """rule and joint: the surprise that they were trained with; 0 where they are not named."""

    starts: ArticleStarts | None = None
    """Tells where articles begin; None where no method asks."""

    def start(self, learning: Learning) -> Mapping[str, float]:
        """Where the search begins, and what an untuned method reads with; see `STARTS`."""
        learning = between_flushes(learning)
        surprise = self.surprises.get(learning, 0.0)
        return {**STARTS[learning], **({SURPRISE: surprise} if surprise else {})}

    def model(self, method: Method) -> LanguageModel:
        """The model that a method reads with."""
        return self.models[method.model]

    def fast_names(self, method: Method) -> tuple[str, ...]:
        """The parameters that a method adapts."""
        learning = between_flushes(method.learning)
        if learning == "none":
            return ()
        if learning in ("sgd", "rms"):
            return self.rival_names
        return self.rules[learning].names

    def rule(self, method: Method) -> AbstractUpdateRule | None:
        """The update rule that a method learns by; None for a static one."""
        if method.learning in FLUSHED:
            inner = self.rule(method.with_(learning=FLUSHED[method.learning]))
            assert inner is not None
            assert self.starts is not None
            return Flushing(inner, self.starts)
        settings = method.settings
        if method.learning == "none":
            return None
        if method.learning == "sgd":
            return GradientDescent(settings["rate"], min(1.0, settings["decay"]))
        if method.learning == "rms":
            rms = self.statistics[method.segment]
            mean = float(sum(tensor.mean() for tensor in rms.values()) / len(rms))
            return RmsDecay(rms, settings["rate"], settings["decay"], settings["eps"] * mean)
        rule = self.rules[method.learning]
        set_scales(rule, settings)
        return rule


def set_scales(rule: AbstractUpdateRule, settings: Mapping[str, float]) -> None:
    """Writes tuned numbers into the scales of that name that a trained rule has as buffers.

    The surprise is left to the loss.

    Raises:
        ValueError: the rule has no scale of that name.
    """
    for name, value in settings.items():
        if name == SURPRISE:
            continue
        scale = getattr(rule, name, None)
        if not isinstance(scale, Tensor):
            raise ValueError(
                f"this rule has no {name}; expected a scale that {type(rule).__name__} has, found "
                f"{', '.join(settings)}; use the settings that were tuned for it"
            )
        scale.fill_(value)
