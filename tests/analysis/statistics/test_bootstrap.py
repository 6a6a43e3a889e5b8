import itertools
import math

import numpy as np
import pytest

from metalm.analysis.statistics import bootstrap
from metalm.analysis.statistics.bootstrap import (
    gain,
    interval_from_resamples,
    perplexity_ratio,
    ratio_intervals,
    resampled_ratios,
    student_quantile,
)
from metalm.analysis.statistics.scores import ArticleScores, Scores


def clustered(random, num_articles):
    """Articles of unequal length whose words share an effect of the article; true gain 0.3."""
    lengths = random.integers(5, 60, num_articles)
    effects = random.normal(0.3, 0.2, num_articles)
    return [
        effect + random.normal(0, 0.3, length)
        for effect, length in zip(effects, lengths, strict=True)
    ]


@pytest.mark.parametrize(("num_articles", "lowest"), [(6, 0.89), (25, 0.92)])
def test_interval_covers_the_truth_on_simulated_clusters(num_articles, lowest):
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        articles = clustered(random, num_articles)
        (interval,) = ratio_intervals(
            [[a.sum() for a in articles]],
            [[len(a) for a in articles]],
            num_resamples=400,
            seed=trial,
        )
        covered += interval.low <= 0.3 <= interval.high
    assert lowest <= covered / 400 <= 0.98


def test_intervals_over_words_would_not_cover():
    """The reason for drawing articles: words of an article are not independent."""
    random = np.random.default_rng(6)
    covered = 0
    for _ in range(200):
        words = np.concatenate(clustered(random, 25))
        covered += abs(words.mean() - 0.3) < 1.96 * words.std() / math.sqrt(len(words))
    assert covered / 200 < 0.7


def test_resamples_follow_the_exact_distribution():
    """Against the enumeration of all 5^5 equally likely resamples."""
    sums, counts = np.array([3.0, -1.0, 2.0, 9.0, 0.5]), np.array([4.0, 2.0, 9.0, 5.0, 1.0])
    exact = np.array(
        [
            sums[list(draw)].sum() / counts[list(draw)].sum()
            for draw in itertools.product(range(5), repeat=5)
        ]
    )
    drawn = resampled_ratios(sums, counts, num_resamples=40_000)[:, 0]
    for value in np.linspace(exact.min() - 0.1, exact.max() + 0.1, 23):
        assert (drawn <= value).mean() == pytest.approx((exact <= value).mean(), abs=0.01)


def test_many_statistics_at_once_equal_one_at_a_time_and_in_parts(monkeypatch):
    random = np.random.default_rng(1)
    above, below = random.normal(size=(3, 7)), random.integers(1, 9, (3, 7))
    together = resampled_ratios(above, below, num_resamples=50)
    alone = [
        resampled_ratios(a, b, num_resamples=50)[:, 0] for a, b in zip(above, below, strict=True)
    ]
    np.testing.assert_allclose(together, np.stack(alone, axis=1), rtol=1e-12)
    monkeypatch.setattr(bootstrap, "COUNTS_AT_ONCE", 30)
    np.testing.assert_allclose(
        resampled_ratios(above, below, num_resamples=50), together, rtol=1e-12
    )


def test_same_seed_same_interval(simulate):
    scores = simulate()
    assert gain(scores, "cache") == gain(scores, "cache")


def test_gain_is_the_mean_saving_of_a_word(simulate):
    scores = simulate()
    saved = [
        float(base - own)
        for a in scores.articles
        for base, own in zip(a.losses["metalm static"], a.losses["metalm"], strict=True)
    ]
    interval = gain(scores, "metalm")
    assert interval.estimate == pytest.approx(math.fsum(saved) / len(saved), rel=1e-12)
    assert 0 < interval.low < interval.estimate < interval.high


def test_turning_the_comparison_around_mirrors_the_interval(simulate):
    scores = simulate()
    there, back = gain(scores, "cache", "metalm"), gain(scores, "metalm", "cache")
    assert there.estimate == pytest.approx(-back.estimate)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_ratio_of_perplexities_is_the_quotient(simulate):
    scores = simulate()
    ratio = perplexity_ratio(scores, "metalm", "cache")
    quotient = scores.perplexity("metalm") / scores.perplexity("cache")
    assert ratio.estimate == pytest.approx(quotient, rel=1e-12)
    saved = gain(scores, "metalm", "cache")
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(-saved.high), math.exp(-saved.low)))


def test_equal_methods_tie_with_an_interval_of_no_width():
    article = [
        ArticleScores(
            title=str(n), words=["w"] * n, losses={m: np.ones(n) for m in ("static", "b")}
        )
        for n in (2, 3, 5, 7, 11)
    ]
    scores = Scores(methods=("static", "b"), articles=tuple(article))
    assert gain(scores, "b") == (0.0, 0.0, 0.0)
    assert perplexity_ratio(scores, "b", "static") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("num_articles", [1, 4])
def test_few_articles_have_an_estimate_but_no_interval(simulate, num_articles):
    interval = gain(simulate((20, 30, 11, 12)[:num_articles]), "cache")
    assert math.isfinite(interval.estimate)
    assert interval[1:] == (None, None)


def test_articles_without_words_do_not_count_as_speaking():
    above = [[1.0, 2.0, 0.0, 0.0, 0.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 0.0]]
    below = [[2.0, 2.0, 0.0, 0.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.0, 2.0, 0.0]]
    few, enough = ratio_intervals(above, below)
    assert few == (1.0, None, None)
    assert enough.estimate == 1.5
    assert 0.5 <= enough.low < 1.5 < enough.high <= 2.5
    (empty,) = ratio_intervals([[0.0] * 6], [[0.0] * 6])
    assert math.isnan(empty.estimate)


@pytest.mark.parametrize(
    ("degrees", "tabulated"),
    [(1, 12.7062047), (2, 4.30265273), (4, 2.77644511), (9, 2.26215716), (59, 2.00099538)],
)
def test_student_quantiles_equal_the_table(degrees, tabulated):
    assert student_quantile(0.975, degrees) == pytest.approx(tabulated, rel=1e-5)


def test_expanded_percentiles_give_the_student_interval_of_a_normal_mean():
    """For a mean the bootstrap spread is sqrt((n - 1) / n) too small; expansion makes it good."""
    num_articles, deviation = 6, 2.0
    shrunk = deviation * math.sqrt((num_articles - 1) / num_articles)
    normal = np.random.default_rng(2).normal(0, shrunk, 400_000)
    interval = interval_from_resamples(0.0, normal, num_articles)
    assert interval.high == pytest.approx(2.5705818 * deviation, rel=0.03)
    assert interval.low == pytest.approx(-2.5705818 * deviation, rel=0.03)
