import numpy as np
import pytest

from metalm.analysis.interactive_plots import round_numbers, telling_points


@pytest.mark.parametrize(
    ("low", "high"), [(35, 90), (100, 2.9e8), (1100, 3000), (42, 43), (7, 7), (0.02, 5), (3, 1e300)]
)
def test_round_numbers_are_few_round_and_about_the_range(low, high):
    numbers = round_numbers(low, high)
    assert 4 <= len(numbers) <= 10
    assert numbers == sorted(set(numbers))
    for number in numbers:
        assert low / 1.3 <= number <= high * 1.3
        assert float(f"{number:.1e}") == pytest.approx(number)


def test_the_peaks_of_a_long_curve_are_kept():
    values = np.sin(np.arange(5000) / 900)
    values[[17, 2345, 4999]] = 3.0, -4.0, 5.0
    kept = telling_points(values, 100)
    assert len(kept) == 100
    assert kept == sorted(set(kept))
    assert {17, 2345, 4999} <= set(kept)


def test_a_short_curve_is_kept_whole():
    assert telling_points(np.array([3.0, 1.0, 2.0]), 3) == [0, 1, 2]
