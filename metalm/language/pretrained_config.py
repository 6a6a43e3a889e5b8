"""What a saved model is, and how it reads best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from metalm.language.network.model import ModelConfig
from metalm.language.reading.cache import CacheConfig
from metalm.language.training.meta_training_config import RuleTrainingConfig


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """Settings of one reading mode, chosen on validation articles."""

    segment: int = 20
    """Tokens between two updates."""
    settings: Mapping[str, float] = field(
        default_factory=lambda: {"rate_scale": 1.0, "decay_scale": 1.0}
    )
    """Numbers of the rule that are tuned and not learned."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The cache that goes with them."""
    flush: bool = False
    """Whether fast weights go back to W_0 where the text shows that an article begins."""
    perplexity: float | None = None
    """Per word, on the validation text of the tuning, without the cache."""
    cached_perplexity: float | None = None
    """The same with the cache."""
    test_perplexity: float | None = None
    """Per word, on the test articles, without the cache; of the weights before rounding."""
    test_static_perplexity: float | None = None
    """The same of a model that does not learn, trained ordinarily on as many tokens."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from."""

    command: str = ""
    """What trained it."""
    seed: int | None = None
    """Of its training."""
    corpus: str = ""
    """What it was trained on."""
    version: str = ""
    """Of metalm, when it was saved."""


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """Everything but the numbers and the vocabulary."""

    model: ModelConfig
    """Size of the language model."""
    rule: RuleTrainingConfig
    """How the rule was trained: its kind and its fast weights follow from this."""
    reset: ReadingSettings = field(default_factory=ReadingSettings)
    """For texts that are read each for itself."""
    carry: ReadingSettings = field(default_factory=ReadingSettings)
    """For a stream of texts that nothing divides."""
    origin: Origin = field(default_factory=Origin)
    """Where it comes from."""
