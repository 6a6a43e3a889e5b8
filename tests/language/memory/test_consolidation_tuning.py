"""Trials of consolidation against plain readings with plain arithmetic between; and the choice."""

import numpy as np
import pytest
import torch

from metalm.language.memory.consolidation import ConsolidationConfig
from metalm.language.memory.consolidation_tuning import (
    ChoiceText,
    ConsolidationTrial,
    choose_consolidation,
    try_settings,
)
from metalm.language.reading.reader import Reader

NAMES = ("decoder.bias", "embedding.weight", "layers.0.input_weight")
SEGMENT = 4


@pytest.fixture
def fisher(tiny_model):
    generator = torch.Generator().manual_seed(9)
    own = dict(tiny_model().named_parameters())
    return {
        n: torch.rand(own[n].shape, generator=generator, dtype=torch.float64) ** 4 for n in NAMES
    }


def put(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


@pytest.mark.parametrize(("share", "elasticity"), [(0.6, 0.8), (1.0, 0.0), (0.0, 0.5)])
def test_a_trial_is_plain_reading_with_plain_arithmetic_between(
    tiny_model, learning, fisher, article_set, texts, plain_read, share, elasticity
):
    """Each article read from home, its way added to wherever W_0 has come to."""
    articles, others = article_set(texts[:3]), article_set(texts[3:])
    rule, update = learning("gradient descent", tiny_model(), NAMES)
    reader = Reader(tiny_model(), rule, NAMES, SEGMENT)
    text = ChoiceText(list(articles), list(others), beginning=3, tokens=9)
    setting = ConsolidationConfig(share=share, elasticity=elasticity)
    (trial,) = try_settings(reader, fisher, text, [setting])

    model = tiny_model()
    home = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    slow = {name: home[name] for name in NAMES}
    cost, cost_at_home = 0.0, 0.0
    guard = [article.tokens[:9] for article in others]
    guard_at_home = sum(plain_read(model, tokens, SEGMENT)[0].sum() for tokens in guard)
    for article in articles:
        beginning, last = article.tokens[:3], {}

        def noting(name, weight, gradient, home, last=last):
            last[name] = update(name, weight, gradient, home)
            return last[name]

        put(model, home)
        cost_at_home += plain_read(model, beginning, SEGMENT)[0].sum()
        plain_read(model, article.tokens[:9], SEGMENT, noting, NAMES)
        put(model, {**home, **slow})
        cost += plain_read(model, beginning, SEGMENT)[0].sum()
        for name in NAMES:
            pull = elasticity * fisher[name] / mean
            arrived = slow[name] + last[name] - home[name]
            kept = share * arrived + (1 - share) * slow[name]
            slow[name] = (kept + pull * home[name]) / (1 + pull)
    put(model, {**home, **slow})
    guard_now = sum(plain_read(model, tokens, SEGMENT)[0].sum() for tokens in guard)
    assert trial.gain == pytest.approx((cost_at_home - cost) / (3 + 1 + 3), abs=1e-10)
    assert trial.forgotten == pytest.approx((guard_now - guard_at_home) / (5 + 9), abs=1e-10)
    away = np.concatenate([(slow[name] - home[name]).flatten() for name in NAMES])
    size = np.concatenate([home[name].flatten() for name in NAMES])
    assert trial.moved == pytest.approx(np.linalg.norm(away) / np.linalg.norm(size), abs=1e-10)
    assert (trial.share, trial.elasticity) == (share, elasticity)
    assert (trial.gain == 0.0) == (share == 0.0)


def trial(share, elasticity, gain, forgotten):
    return ConsolidationTrial(
        share=share, elasticity=elasticity, gain=gain, forgotten=forgotten, moved=0.0, seconds=0.0
    )


def test_the_choice():
    trials = [
        trial(0.1, 0.5, 0.01, -0.1),
        trial(0.2, 0.5, 0.03, -0.01),
        trial(0.4, 0.5, 0.09, 0.001),
        trial(0.1, 0.0, 0.02, 0.03),
        trial(0.2, 0.0, 0.08, 0.04),
    ]
    found = choose_consolidation(trials)
    assert {name: (setting.share, setting.elasticity) for name, setting in found.items()} == {
        "elastic": (0.2, 0.5),
        "same share, no penalty": (0.2, 0.0),
        "no penalty, own share": (0.1, 0.0),
        "plain carry": (1.0, 0.0),
    }
    for part in (trials[:3], trials[3:]):
        with pytest.raises(ValueError, match="nothing to choose from"):
            choose_consolidation(part)
