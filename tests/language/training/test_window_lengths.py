import math

import numpy as np
import pytest

from metalm.language.training.window_lengths import WindowLengths, WindowPlan

PUBLISHED = WindowLengths(70, 0.05, 5.0, 5)


def cut_normal(mean, spread, shortest, length):
    """P(max(shortest, int(N(mean, spread))) = length), from the normal distribution function."""

    def below(value):
        return 0.5 * (1.0 + math.erf((value - mean) / (spread * math.sqrt(2.0))))

    if length < shortest:
        return 0.0
    if length == shortest:
        return below(shortest + 1)
    return below(length + 1) - below(length)


@pytest.mark.parametrize("lengths", [PUBLISHED, WindowLengths(9, 0.3, 4.0, 6)])
def test_lengths_have_the_published_distribution(lengths):
    """Counts of 40,000 draws against the mixture of two cut normals, by a chi-square of the bins.

    With k bins its mean is k - 1 and its variance 2 (k - 1): six deviations are allowed.
    """
    random = np.random.default_rng(5)
    draws = [lengths.draw(random) for _ in range(40_000)]
    longest = max(draws)
    expected, found = [], np.bincount(draws, minlength=longest + 1)
    for length in range(longest + 1):
        parts = (
            (1 - lengths.short_share, lengths.mean),
            (lengths.short_share, lengths.mean / 2),
        )
        expected.append(
            sum(
                share * cut_normal(mean, lengths.spread, lengths.shortest, length)
                for share, mean in parts
            )
        )
    counts = np.array(expected) * len(draws)
    common = counts > 8
    assert counts[common].sum() > 0.995 * len(draws)
    distance = float(((found[common] - counts[common]) ** 2 / counts[common]).sum())
    freedom = common.sum() - 1
    assert abs(distance - freedom) < 6 * math.sqrt(2 * freedom)


def test_windows_follow_one_another_and_end_with_the_text():
    length, epochs = 97, 4
    plan = WindowPlan(WindowLengths(12, 0.2, 3.0, 2), length, epochs, seed=3)
    windows = [plan.at(index) for index in range(plan.num_steps)]
    assert sum(window.is_last for window in windows) == epochs
    cuts = []
    for epoch in range(epochs):
        of_epoch = [window for window in windows if window.epoch == epoch]
        place = 0
        for number, window in enumerate(of_epoch):
            assert window.start == place
            assert window.done == epoch + number / len(of_epoch)
            place += window.length
        assert of_epoch[-1].start < length - 1 <= place
        assert [window.is_last for window in of_epoch] == [*[False] * (len(of_epoch) - 1), True]
        cuts.append(tuple(window.start for window in of_epoch))
    assert len(set(cuts)) == epochs  # no pass is cut like another


def test_a_window_follows_from_its_number():
    lengths = WindowLengths(12, 0.2, 3.0, 2)
    plan = WindowPlan(lengths, 97, 5, seed=3)
    forwards = [plan.at(index) for index in range(plan.num_steps)]
    again = WindowPlan(lengths, 97, 5, seed=3)
    backwards = [again.at(index) for index in reversed(range(again.num_steps))]
    assert forwards == backwards[::-1]
    other = WindowPlan(lengths, 97, 5, seed=4)
    assert [other.at(index) for index in range(9)] != forwards[:9]


def test_a_single_token_is_not_left_for_a_window():
    always_four = WindowLengths(4.5, 0.0, 0.0, 1)
    starts = {9: [0, 4], 10: [0, 4, 8], 8: [0, 4], 2: [0]}
    for length, expected in starts.items():
        plan = WindowPlan(always_four, length, 1, seed=0)
        assert [plan.at(index).start for index in range(plan.num_steps)] == expected
