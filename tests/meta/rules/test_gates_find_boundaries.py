"""Gates trained on streams of unannounced subjects: they let go where a new one begins."""

import pytest
import torch

from metalm.meta.rules import Gated, LearnedRates
from metalm.meta.unroll import unroll

ROWS, SIZE, STEPS, LENGTH = 16, 20, 48, 12


def streams(seed):
    """Noisy sights of a centre that changes every LENGTH steps, at another place in each row."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, LENGTH, (ROWS,), generator=generator)
    subjects = (torch.arange(STEPS)[:, None] + offsets) // LENGTH
    centres = torch.randn(STEPS // LENGTH + 1, ROWS, SIZE, generator=generator)
    sights = centres[subjects, torch.arange(ROWS)]
    sights = sights + torch.randn(STEPS, ROWS, SIZE, generator=generator)
    begins = subjects.diff(dim=0, prepend=subjects[:1]) > 0
    return list(sights), begins


def loss(parameters, sight, state):
    """The mean squared distance, by row."""
    return (parameters["w"] - sight).square().mean(1), None, state


def train(rule):
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    for step in range(150):
        slow = {"w": torch.zeros(SIZE)}
        result = unroll(loss, rule, slow, {}, streams(step)[0], None, rows=ROWS)
        optimizer.zero_grad()
        (result.meta_loss / ROWS / STEPS).backward()
        optimizer.step()
    return rule


def read(rule):
    """Mean loss on streams of their own, and the flush gate of every step."""
    total, at_begin, elsewhere = 0.0, [], []
    for seed in range(1000, 1010):
        sights, begins = streams(seed)
        fast = {"w": torch.zeros(ROWS, SIZE)}
        state = rule.initial_state(fast)
        for sight, begin in zip(sights, begins, strict=True):
            result = unroll(
                loss,
                rule,
                {"w": torch.zeros(SIZE)},
                {},
                [sight],
                None,
                fast=fast,
                rule_state=state,
                order=0,
            )
            fast, state = result.fast, result.rule_state
            total += result.meta_loss.item()
            if isinstance(rule, Gated):
                flush = rule.mean_gates(state)["w"][:, 1]
                at_begin.append(flush[begin])
                elsewhere.append(flush[~begin])
    return total / 10 / ROWS / STEPS, at_begin, elsewhere


@pytest.mark.slow
def test_the_flush_gate_opens_where_a_subject_begins():
    def rates():
        return LearnedRates({"w": torch.full((SIZE,), 0.14)}, rate=2.0, decay=0.05, exponent=0.0)

    plain, _, _ = read(train(rates()))
    gated, at_begin, elsewhere = read(train(Gated(rates())))
    at_begin, elsewhere = (float(torch.cat(some).mean()) for some in (at_begin, elsewhere))
    # The sights' own noise is 1 of every loss.
    assert gated - 1 < 0.95 * (plain - 1)
    assert at_begin > 2 * elsewhere
