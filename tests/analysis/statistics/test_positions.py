import math

import numpy as np
import pytest

from metalm.analysis.statistics.positions import bin_edges, by_position, choose_cohort_length
from metalm.analysis.statistics.scores import ArticleScores, Scores


def brute_force(scores, low, high, limit=None):
    """Losses of every method at positions low <= position < high, word by word."""
    found = {method: [] for method in scores.methods}
    articles = 0
    for article in scores.articles:
        if limit is not None and article.num_words < limit:
            continue
        places = [p for p in range(article.num_words) if low <= p < high]
        places = [p for p in places if limit is None or p < limit]
        articles += bool(places)
        for method in scores.methods:
            found[method] += [float(article.losses[method][p]) for p in places]
    return articles, found


@pytest.mark.parametrize("cohort_length", [None, 256])
def test_bins_equal_loops_over_words(simulate, cohort_length):
    scores = simulate((700, 130, 300, 45, 513, 256))
    bins = by_position(scores, cohort_length=cohort_length)
    for index, (low, high) in enumerate(zip(bins.edges, bins.edges[1:], strict=False)):
        articles, found = brute_force(scores, low, high, cohort_length)
        assert bins.num_articles[index] == articles
        assert bins.num_words[index] == len(found["static"]) > 0
        for method, losses in found.items():
            mean = math.fsum(losses) / len(losses)
            assert bins.perplexity[method][index] == pytest.approx(math.exp(mean), rel=1e-10)
        for method in scores.adaptive:
            saved = math.fsum(found[scores.baselines[method]]) - math.fsum(found[method])
            assert bins.gain[method][index].estimate == pytest.approx(
                saved / len(found[method]), abs=1e-10
            )


def test_all_words_are_in_one_bin_each(simulate):
    scores = simulate((700, 128, 129, 1, 513))
    assert sum(by_position(scores).num_words) == scores.num_words.sum()


def test_cohort_holds_the_same_articles_in_every_bin(simulate):
    bins = by_position(simulate((700, 130, 512, 45, 513, 511)), cohort_length=512)
    assert bins.edges == (0, 128, 256, 512)
    assert bins.num_articles == (3, 3, 3)
    assert bins.num_words == (384, 384, 768)


def test_edges_double_and_the_last_bin_is_open():
    assert bin_edges(1) == bin_edges(128) == (0, 128)
    assert bin_edges(129) == (0, 128, 256)
    assert bin_edges(8192)[-2:] == (4096, 8192)
    assert bin_edges(14_000)[-2:] == (8192, 14_000)


def test_labels_name_the_bins():
    words = ["w"] * 9000
    long = ArticleScores(title="A", words=words, losses={"static": np.ones(9000)})
    bins = by_position(Scores(methods=("static",), articles=(long,)))
    assert bins.labels[:4] == ("0–128", "128–256", "256–512", "512–1K")
    assert bins.labels[-2:] == ("4K–8K", "8K+")
    assert bins.gain == {}


def test_growth_is_found_where_it_was_planted(simulate):
    bins = by_position(simulate((700, 650, 600, 545, 513, 800, 900)), cohort_length=512)
    for method in ("dynamic evaluation", "metalm"):
        growth, gains = bins.growth[method], bins.gain[method]
        assert growth.estimate == pytest.approx(gains[-1].estimate - gains[0].estimate)
        assert growth.low > 0


def test_growth_of_a_steady_gain_does_not_exclude_zero():
    random = np.random.default_rng(8)
    articles = []
    for index in range(7):
        static = random.gamma(2, 2, 300)
        steady = static - 0.2 + random.normal(0, 0.5, 300)
        losses = {"static": static, "steady": steady}
        articles.append(ArticleScores(title=str(index), words=["w"] * 300, losses=losses))
    scores = Scores(methods=("static", "steady"), articles=tuple(articles))
    bins = by_position(scores, cohort_length=256)
    assert bins.growth["steady"].low < 0 < bins.growth["steady"].high
    assert all(interval.low > 0 for interval in bins.gain["steady"])


def test_gain_can_be_measured_against_any_method(simulate):
    scores = simulate()
    bins = by_position(scores, against={"metalm": "cache"})
    _, found = brute_force(scores, 0, 128)
    saved = math.fsum(found["cache"]) - math.fsum(found["metalm"])
    assert list(bins.gain) == ["metalm"]
    assert bins.gain["metalm"][0].estimate == pytest.approx(saved / len(found["cache"]))


def test_a_single_short_article_has_one_bin_without_growth(simulate):
    bins = by_position(simulate((1,)))
    assert (bins.edges, bins.num_words, bins.num_articles) == ((0, 128), (1,), (1,))
    assert bins.growth["metalm"] is None


def test_cohort_length_needs_enough_articles():
    assert choose_cohort_length([2048] * 10 + [50] * 50) == 2048
    assert choose_cohort_length([2048] * 9 + [2047] + [50] * 50) == 1024
    assert choose_cohort_length([5000, 300, 2]) == 256
    assert choose_cohort_length([200] * 30) is None
    assert choose_cohort_length([9000]) is None


def test_a_cohort_nobody_reaches_is_refused(simulate):
    with pytest.raises(ValueError, match="at least 4096 words, found at most 700"):
        by_position(simulate(), cohort_length=4096)
