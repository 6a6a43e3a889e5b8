"""Rules side by side: each row takes the step of its own rule, as that rule does alone."""

import pytest
import torch

from metalm.meta.rules import GradientDescent, LearnedRates, RmsDecay
from metalm.meta.rules.side_by_side import SideBySide

SHAPES = {"bias": (5,), "weight": (4, 3)}


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(4)

    def draw(*rows):
        return {
            name: torch.randn(*rows, *shape, generator=generator, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }

    rms = {name: tensor.abs() for name, tensor in draw().items()}
    rules = [
        GradientDescent(0.3, 0.1),
        RmsDecay(rms, 0.2, 0.05, 0.5),
        GradientDescent(0.2),
        LearnedRates(rms, "row", 0.4, 0.02),
    ]
    return rules, draw(len(rules)), draw(len(rules)), draw()


def test_each_row_takes_the_step_of_its_rule(parts):
    rules, fast, gradients, slow = parts
    together = SideBySide([rule.coefficients() for rule in rules])
    new, state = together(fast, gradients, slow, None)
    assert state is None
    written = {name: tensor.clone() for name, tensor in fast.items()}
    assert together.update_(written, gradients, slow, None) is None
    for row, rule in enumerate(rules):
        alone, _ = rule(
            {name: tensor[row] for name, tensor in fast.items()},
            {name: tensor[row] for name, tensor in gradients.items()},
            slow,
            None,
        )
        for name in SHAPES:
            torch.testing.assert_close(new[name][row], alone[name], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(written[name][row], alone[name], rtol=1e-14, atol=1e-14)


def test_as_many_rows_as_rules(parts):
    rules, fast, gradients, slow = parts
    together = SideBySide([rule.coefficients() for rule in rules[:3]])
    for take in (together, together.update_):
        with pytest.raises(ValueError, match="expected 3 rows, found 4; do let all rows"):
            take(fast, gradients, slow, None)
    with pytest.raises(ValueError, match="expected those of at least one row, found 0"):
        SideBySide([])
