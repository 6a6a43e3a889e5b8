"""What gates see of a row's losses, against sums written out; and through the gates themselves."""

import math

import pytest
import torch

from metalm.meta.rules import Gated, LearnedRates
from metalm.meta.rules.loss_memory import FEATURES, after_the_step, features, fresh

LOSSES = [5.0, 4.0, -9.0, 3.5, 3.6, 3.5, 12.0, 11.0]


def average(numbers, horizon):
    weights = [math.exp(-age / horizon) for age in range(len(numbers))]
    return sum(w * n for w, n in zip(weights, reversed(numbers), strict=True)) / sum(weights)


def by_hand(losses):
    """The features of the last of these losses."""
    last = losses[-1]
    surprises = [loss - average(losses[:step], 20) for step, loss in enumerate(losses) if step > 0]
    expected = {
        "loss": math.copysign(math.log(1 + abs(last)), last),
        "surprise": 0.0,
        "drift": 0.0,
        "position": math.log(len(losses)) / math.log(513),
    }
    if surprises:
        floor = (average(losses[:-1], 20) / 1000) ** 2
        spread = math.sqrt(average([u * u for u in surprises], 20) + floor)
        drift = average(losses, 3) - average(losses[:-1], 20)
        expected["surprise"] = surprises[-1] / (abs(surprises[-1]) + spread)
        expected["drift"] = drift / (abs(drift) + spread)
    return expected


def test_features_by_hand():
    like = torch.zeros((), dtype=torch.float64)
    memory = fresh((2,), like)
    for step in range(len(LOSSES)):
        memory |= {"loss": torch.tensor([LOSSES[step], LOSSES[-1 - step]]).to(like)}
        found = features(memory, FEATURES)
        for row, losses in enumerate((LOSSES, LOSSES[::-1])):
            expected = by_hand(losses[: step + 1])
            assert dict(zip(FEATURES, found[row].tolist(), strict=True)) == pytest.approx(expected)
        memory = after_the_step(memory)


def test_units_of_the_loss_do_not_matter_to_surprise():
    like, found = torch.zeros((), dtype=torch.float64), []
    for unit in (1.0, 1000.0):
        memory = fresh((), like)
        for loss in LOSSES:
            memory = after_the_step(memory | {"loss": torch.tensor(loss * unit).to(like)})
        found.append(features(memory | {"loss": torch.tensor(unit).to(like)}, FEATURES[1:3]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_derivatives_to_the_losses(steps):
    """Second order goes through them, from the very first step on."""

    def last(losses):
        memory = fresh((), losses)
        for loss in losses[:-1]:
            memory = after_the_step(memory | {"loss": loss})
        return features(memory | {"loss": losses[-1]}, FEATURES)

    losses = torch.tensor(LOSSES[:steps], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(last, [losses])


def test_losses_that_never_change_are_no_surprise():
    memory = fresh((), torch.zeros(()))
    for _ in range(600):
        memory = after_the_step(memory | {"loss": torch.tensor(2.5)})
    surprise, drift, position = features(memory, FEATURES[1:]).tolist()
    assert abs(surprise) < 1e-3
    assert abs(drift) < 1e-3
    assert position == 1.0


def test_the_gates_see_them():
    """The update gate of a rule that sees the row alone."""
    rule = Gated(LearnedRates({"w": torch.ones(2).double()}), sees=FEATURES)
    weights = (0.3, 1.5, -0.7, 0.9)
    with torch.no_grad():
        rule.from_row[0] = torch.tensor(weights)
    fast, slow = {"w": torch.zeros(1, 2).double()}, {"w": torch.zeros(2).double()}
    state = rule.initial_state(fast)
    for step, loss in enumerate(LOSSES):
        state = rule.observe(state, torch.tensor([loss]).double())
        _, state = rule(fast, fast, slow, state)
        seen = by_hand(LOSSES[: step + 1]).values()
        z = sum(weight * number for weight, number in zip(weights, seen, strict=True))
        gate = rule.mean_gates(state)["w"][0, 0].item()
        assert gate == pytest.approx(2 / (1 + math.exp(-z)), rel=1e-6)
