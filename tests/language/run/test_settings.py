"""Settings that would fail only after hours of training are refused when they are set."""

import re

import pytest

from metalm.language.run.presets import PRESETS, EvaluationConfig
from metalm.language.text.data_config import DataConfig
from metalm.language.training.base_training import BaseTrainingConfig
from metalm.language.training.meta_training_config import JointTrainingConfig, RuleTrainingConfig
from metalm.language.tuning.tuning_text import TuningConfig


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TuningConfig, {"segments": ()}, "tuning.segments is empty; expected one value or more"),
        (TuningConfig, {"rule_segments": ()}, "tuning.rule_segments is empty"),
        (TuningConfig, {"thetas": ()}, "tuning.thetas is empty"),
        (
            TuningConfig,
            {"shares": (0.1, 1.0)},
            "impossible tuning.shares; expected 0 <= shares",
        ),
        (TuningConfig, {"articles": 0}, "tuning.articles is too low; expected at least 1"),
        (TuningConfig, {"segments": (5, 0)}, "at least 1, found 5, 0; do raise it"),
        (TuningConfig, {"carry_tokens": -1}, "tuning.carry_tokens is too low; expected at least 0"),
        (TuningConfig, {"surprise": -1.0}, "surprise is the power"),
        (EvaluationConfig, {"rows": 0}, "evaluation.rows is too low"),
        (EvaluationConfig, {"modes": ()}, "evaluation.modes is empty"),
        (BaseTrainingConfig, {"window": 0}, "base.window is too low"),
        (BaseTrainingConfig, {"warm_up": 1.0}, "impossible base.warm_up"),
        (RuleTrainingConfig, {"segment": 0}, "rule.segment is too low"),
        (JointTrainingConfig, {"segment": 0}, "joint.segment is too low"),
        (JointTrainingConfig, {"rows": -2}, "joint.rows is too low; expected at least 1, found -2"),
        (DataConfig, {"held_out": 1.0}, "impossible data.held_out; expected 0 <= held_out < 1"),
        (DataConfig, {"held_out": -0.1}, "impossible data.held_out"),
        (DataConfig, {"vocabulary_size": 0}, "data.vocabulary_size is too low"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**settings)


def test_every_preset_can_be():
    assert {name: preset().preset for name, preset in PRESETS.items()} == {n: n for n in PRESETS}
