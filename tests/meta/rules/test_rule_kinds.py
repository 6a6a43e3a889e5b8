"""Rules by name: what is built, and that each takes the learned rates' first step."""

from typing import get_args

import pytest
import torch

from metalm.meta.rules import CoordinateLSTM, Gated, LearnedRates, Momentum
from metalm.meta.rules.kinds import RuleKind, learned_rule


@pytest.fixture
def rates(tiny):
    return LearnedRates.from_krause(tiny.rms, 0.02, 0.1, 0.3, "row")


@pytest.mark.parametrize("kind", get_args(RuleKind))
def test_every_kind_starts_as_the_learned_rates(kind, rates, tiny):
    fast = tiny.start()
    gradients = {name: weight.sin() for name, weight in fast.items()}
    rule = learned_rule(kind, rates)
    assert rule.names == rates.names
    assert rule.rate_scale is rates.rate_scale
    assert rule.decay_scale is rates.decay_scale
    new, _ = rule(fast, gradients, tiny.slow, rule.initial_state(fast))
    expected, _ = rates(fast, gradients, tiny.slow, None)
    for name, weight in expected.items():
        torch.testing.assert_close(new[name], weight, rtol=1e-13, atol=1e-15)


def test_settings_reach_the_rule(rates):
    gated = learned_rule("gated", rates, {"hidden": 3, "sees": ("loss", "rms")})
    assert isinstance(gated, Gated)
    assert (gated.hidden, gated.sees, gated.sees_of_row) == (3, ("rms",), ("loss",))
    lstm = learned_rule("lstm", rates, {"coordinates": 9})
    assert isinstance(lstm, CoordinateLSTM)
    assert lstm.coordinates == 9
    momentum = learned_rule("momentum", rates, {"keep": 0.25})
    assert isinstance(momentum, Momentum)
    assert all(keep == 0.25 for keep in momentum.coefficients().keeps.values())
    assert learned_rule("rates", rates) is rates


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gates", {}, "expected 'rates', 'gated', 'lstm', 'momentum', found 'gates'"),
        ("gated", {"coordinates": 9}, "has no setting 'coordinates'; expected hidden, sees, seed"),
        ("rates", {"hidden": 2}, "has no setting 'hidden'; expected none"),
        ("momentum", {"hidden": 2}, "has no setting 'hidden'; expected keep, found 'hidden'"),
    ],
)
def test_refused_names(kind, settings, message, rates):
    with pytest.raises(ValueError, match=message):
        learned_rule(kind, rates, settings)
