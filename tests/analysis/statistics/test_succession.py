import numpy as np
import pytest

from metalm.analysis.statistics.scores import ArticleScores, Scores
from metalm.analysis.statistics.succession import along_articles, letter, running_mean


@pytest.mark.parametrize(("length", "window"), [(11, 4), (11, 5), (3, 8), (1, 6), (7, 1)])
def test_running_mean_equals_a_loop(length, window):
    values = np.random.default_rng(0).normal(size=length)
    expected = []
    for place in range(length):
        start = place - window // 2
        inside = [values[p] for p in range(start, start + window) if 0 <= p < length]
        expected.append(sum(inside) / len(inside))
    np.testing.assert_allclose(running_mean(values, window), expected, rtol=1e-12, atol=1e-14)


def test_follows_consecutive_articles_with_their_boundaries(simulate):
    course = along_articles(simulate((9, 4, 7, 5, 6)), first=1, num_articles=3, window=3)
    assert course.titles == ("title 1", "title 2", "title 3")
    assert course.boundaries.tolist() == [0, 4, 11, 16]
    assert course.spans == ((0, 4), (4, 11), (11, 16))
    assert {len(gains) for gains in course.gain.values()} == {16}
    assert set(course.gain) == {"dynamic evaluation", "cache", "metalm", "metalm + cache"}


def test_fewer_articles_than_asked_for_are_taken_as_they_are(simulate):
    assert len(along_articles(simulate()).titles) == 5


def test_the_mean_never_reaches_over_a_boundary():
    def two(second):
        losses = ({"static": np.ones(6), "b": np.zeros(6)}, {"static": second, "b": np.zeros(5)})
        articles = tuple(
            ArticleScores(title="x", words=["w"] * len(loss["b"]), losses=loss) for loss in losses
        )
        return along_articles(Scores(methods=("static", "b"), articles=articles), window=4)

    calm, wild = two(np.ones(5)), two(np.full(5, 100.0))
    np.testing.assert_array_equal(calm.gain["b"], np.ones(11))
    np.testing.assert_array_equal(wild.gain["b"], [1.0] * 6 + [100.0] * 5)


def test_letters_name_the_articles():
    assert [letter(i) for i in (0, 7, 25, 26, 53)] == ["A", "H", "Z", "A1", "B2"]


def test_starting_behind_the_end_is_refused(simulate):
    with pytest.raises(ValueError, match="expected first below 5, found 5"):
        along_articles(simulate(), first=5)
