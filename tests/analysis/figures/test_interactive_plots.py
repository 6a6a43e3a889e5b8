import numpy as np

from metalm.analysis.figures.interactive_plots import telling_points


def test_the_peaks_of_a_long_curve_are_kept():
    values = np.sin(np.arange(5000) / 900)
    values[[17, 2345, 4999]] = 3.0, -4.0, 5.0
    kept = telling_points(values, 100)
    assert len(kept) == 100
    assert kept == sorted(set(kept))
    assert {17, 2345, 4999} <= set(kept)


def test_a_short_curve_is_kept_whole():
    assert telling_points(np.array([3.0, 1.0, 2.0]), 3) == [0, 1, 2]
