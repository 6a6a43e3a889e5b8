import math

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import mixed_nats
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.mixing import STEP, mixture
from metalm.language.reading.reader import Readings

PRIOR = (0.5, 0.2, 0.3)


@pytest.fixture
def said():
    """Log probabilities of 40 tokens by three predictors; the last sometimes says nothing, or 0."""
    found = np.log(np.random.default_rng(7).uniform(0.001, 0.9, (3, 40)))
    found[2, [0, 1, 9]] = np.nan
    found[2, [4, 20]] = -np.inf
    return found


def log_mixture(logits, told):
    """log p of one token, as the docstring has it, in plain floats."""
    known = [k for k, number in enumerate(told) if not math.isnan(number)]
    total = sum(math.exp(logits[k]) for k in known)
    return math.log(sum(math.exp(logits[k]) / total * math.exp(told[k]) for k in known))


def by_finite_differences(found, prior, step):
    """The mixture with its gradient in the logits from differences of log p."""
    logits, nats = [math.log(weight) for weight in prior], []
    for told in found.T:
        nats.append(-log_mixture(logits, told))
        slopes = []
        for k in range(len(logits)):
            up, down = ([*logits] for _ in range(2))
            up[k] += 1e-5
            down[k] -= 1e-5
            slopes.append((log_mixture(up, told) - log_mixture(down, told)) / 2e-5)
        logits = [logit + step * slope for logit, slope in zip(logits, slopes, strict=True)]
    return nats


@pytest.mark.parametrize("step", [0.0, STEP, 1.5])
def test_weights_climb_the_log_probability_of_each_token(said, step):
    expected = by_finite_differences(said, PRIOR, step)
    np.testing.assert_allclose(mixture(said, PRIOR, step).nats, expected, rtol=1e-7)


def test_a_token_is_scored_before_the_weights_learn_from_it(said):
    changed = said.copy()
    changed[:, 25:] = np.log(0.5)
    before, after = (mixture(each, PRIOR, 1.0).nats for each in (said, changed))
    np.testing.assert_array_equal(before[:25], after[:25])
    changed = said.copy()
    changed[:, 24] -= (0.0, 3.0, 1.0)
    felt = mixture(changed, PRIOR, 1.0).nats
    np.testing.assert_array_equal(before[:24], felt[:24])
    assert (before[25:] != felt[25:]).all()


def test_the_better_predictor_wins_the_weight():
    good, bad = np.log(np.full(400, 0.5)), np.log(np.full(400, 0.01))
    nats = mixture([bad, good], [0.5, 0.5]).nats
    assert math.isclose(nats[0], -math.log(0.255), rel_tol=1e-12)
    assert (np.diff(nats) < 0).all()
    assert nats[-1] < -math.log(0.48)


def test_tiny_probabilities_do_not_vanish():
    nats = mixture([[-800.0, -900.0], [-801.0, -900.0]], [0.5, 0.5], 0.0).nats
    expected = [800 + math.log(2) - math.log1p(math.exp(-1)), 900]
    np.testing.assert_allclose(nats, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("found", "prior", "step", "message"),
    [
        (np.zeros((2, 3)), [0.5, 0.2, 0.3], 0.1, "do not fit"),
        (np.zeros(3), [1.0], 0.1, "do not fit"),
        (np.zeros((2, 3)), [1.0, 0.0], 0.1, "above 0"),
        (np.zeros((2, 3)), [1.0, math.inf], 0.1, "above 0"),
        (np.zeros((2, 3)), [1.0, 1.0], -0.1, "at least 0"),
    ],
)
def test_impossible_mixtures_are_refused(found, prior, step, message):
    with pytest.raises(ValueError, match=message):
        mixture(found, prior, step)


@pytest.fixture
def readings(said):
    """Two copies of two texts, each with a cache at two flatnesses."""
    random = np.random.default_rng(2)
    texts = (slice(0, 15), slice(15, 40))
    return [
        Readings(
            [-said[copy, text] for text in texts],
            [
                np.stack([said[2, text], random.normal(-2, 1, said[2, text].shape)])
                for text in texts
            ],
        )
        for copy in (0, 1)
    ]


def test_one_copy_has_a_fixed_share(readings):
    alone = nats_of_copies(readings[:1])
    cached = nats_of_copies(readings[:1], 0, 0.2)
    for text in range(2):
        np.testing.assert_array_equal(alone[text], readings[0].nats[text])
        expected = mixed_nats(
            torch.from_numpy(alone[text]), torch.from_numpy(readings[0].cache[text][0]), 0.2
        )
        np.testing.assert_array_equal(cached[text], expected)


@pytest.mark.parametrize("share", [None, 0.0, 0.2])
def test_several_copies_begin_as_equals_in_every_text(readings, share):
    found = nats_of_copies(readings, None if share is None else 1, share or 0.0)
    for text, nats in enumerate(found):
        said = [-copy.nats[text] for copy in readings]
        prior = [0.5, 0.5]
        if share:
            said.append(readings[1].cache[text][1])
            prior = [0.4, 0.4, 0.2]
        expected = by_finite_differences(np.stack(said), prior, STEP)
        np.testing.assert_allclose(nats, expected, rtol=1e-7)
