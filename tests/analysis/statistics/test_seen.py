import math

import numpy as np
import pytest

from metalm.analysis.statistics.scores import ArticleScores, Scores
from metalm.analysis.statistics.seen import GROUPS, by_last_use, by_seen, last_use


def distance(words, position):
    """Words back to the same word, found by walking back; 0 if there is none."""
    for back in range(1, position + 1):
        if words[position - back] == words[position]:
            return back
    return 0


def test_last_use_equals_walking_back(simulate):
    for article in simulate().articles:
        expected = [distance(article.words, p) for p in range(article.num_words)]
        assert last_use(article.words).tolist() == expected


def group_of(word, back):
    if word in ("\n", "<unk>"):
        return "end of line or <unk>"
    return "seen before" if back else "new"


def bin_of(word, back):
    if word in ("\n", "<unk>") or not back:
        return None
    return (
        "< 32" if back < 32 else "32–128" if back < 128 else "128–512" if back < 512 else "512–2K"
    )


@pytest.mark.parametrize(("function", "name_of"), [(by_seen, group_of), (by_last_use, bin_of)])
def test_groups_equal_loops_over_words(simulate, function, name_of):
    scores = simulate()
    result = function(scores)
    found: dict = {}
    for article in scores.articles:
        for position, word in enumerate(article.words):
            name = name_of(word, distance(article.words, position))
            for method in scores.methods:
                found.setdefault((name, method), []).append(float(article.losses[method][position]))
    for index, name in enumerate(result.groups):
        losses = found.get((name, "static"), [])
        assert result.num_words[index] == len(losses)
        for method in scores.methods:
            if not losses:
                assert result.perplexity[method][index] is None
                continue
            mean = math.fsum(found[name, method]) / len(losses)
            assert result.perplexity[method][index] == pytest.approx(math.exp(mean))
        for method in scores.adaptive:
            interval = result.gain[method][index]
            if not losses:
                assert interval is None
                continue
            saved = math.fsum(found[name, scores.baselines[method]]) - math.fsum(
                found[name, method]
            )
            assert interval.estimate == pytest.approx(saved / len(losses))


def test_the_groups_share_out_the_words(simulate):
    scores = simulate()
    seen = by_seen(scores)
    assert seen.groups == GROUPS
    assert sum(seen.num_words) == scores.num_words.sum()
    assert sum(by_last_use(scores).num_words) == seen.num_words[1]


def test_articles_do_not_see_one_another():
    losses = {"static": np.ones(2)}
    twice = tuple(ArticleScores(title=t, words=["a", "b"], losses=losses) for t in "AB")
    assert by_seen(Scores(methods=("static",), articles=twice)).num_words == (4, 0, 0)
