import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_prep.synthetic import (
    SyntheticText,
    best_losses,
    expected_gains,
    invent_names,
    synthetic_source,
)
from metalm.language.text.vocabulary import split_words

SMALL = SyntheticText(
    num_names=5,
    cast_size=3,
    num_verbs=2,
    num_lines=2,
    num_articles={"train": 4, "valid": 3, "test": 2},
)


def names_of(text):
    return [word for line in text.splitlines() for word in line.split()[0:3:2]]


CASTS = list(itertools.combinations(invent_names(SMALL), SMALL.cast_size))


def bayes_losses(drawn, casts=CASTS):
    """Losses of the reader who averages over every possible cast."""
    share = Fraction(1, len(casts[0]))
    weights = [Fraction(1, len(casts))] * len(casts)
    losses = []
    for name in drawn:
        joint = [
            weight * share if name in cast else Fraction(0)
            for cast, weight in zip(casts, weights, strict=True)
        ]
        losses.append(-math.log(sum(joint) / sum(weights)))
        weights = joint
    return losses


def test_best_losses_equal_averaging_over_every_cast():
    for article in synthetic_source(SMALL).splits["train"]():
        best = best_losses(article.text, SMALL)
        is_name = np.arange(len(best.with_memory)) % 5 % 2 == 0
        is_name[4::5] = False
        expected = bayes_losses(names_of(article.text))
        np.testing.assert_allclose(best.with_memory[is_name], expected, rtol=1e-12)
        np.testing.assert_allclose(best.without_memory[is_name], math.log(5), rtol=1e-12)
        for losses in best:
            np.testing.assert_allclose(losses[1::5], math.log(2), rtol=1e-12)
            assert not losses[3::5].any()
            assert not losses[4::5].any()
        assert len(best.with_memory) == len(split_words(article.text))


def test_expected_gains_equal_an_average_over_every_sequence_of_names():
    cast = invent_names(SMALL)[: SMALL.cast_size]
    total = np.zeros(2 * SMALL.num_lines)
    sequences = list(itertools.product(cast, repeat=len(total)))
    for drawn in sequences:
        total += math.log(5) - np.array(bayes_losses(drawn))
    np.testing.assert_allclose(expected_gains(SMALL), total / len(sequences), rtol=1e-12)


def test_gains_begin_at_nothing_and_grow_to_their_limit():
    settings = SyntheticText(num_lines=60)
    gains = expected_gains(settings)
    assert gains[0] == pytest.approx(0, abs=1e-12)
    assert (np.diff(gains) > 0).all()
    assert gains[-1] == pytest.approx(math.log(100 / 5), rel=1e-6)


def test_text_is_the_same_each_time_and_fits_its_settings():
    source = synthetic_source(SMALL)
    articles = list(source.splits["train"]())
    assert articles == list(source.splits["train"]())
    assert len(articles) == 4
    texts = [article.text for split in source.splits.values() for article in split()]
    assert len(set(texts)) == len(texts) == 9
    for text in texts:
        assert text.count("\n") == 2
        assert len(set(names_of(text))) <= 3
        assert set(names_of(text)) <= set(invent_names(SMALL))


def test_names_are_distinct_and_drawn_about_equally():
    settings = SyntheticText()
    assert len(set(invent_names(settings))) == 100
    drawn = Counter(
        name for article in synthetic_source().splits["train"]() for name in names_of(article.text)
    )
    # 200 articles of 5 names: each is in 10 casts on average, standard deviation about 3.
    assert set(drawn) == set(invent_names(settings))
    assert max(drawn.values()) < 5 * 400


@pytest.mark.parametrize("text", ["Bobo sees Bobo .\n", "x\n", "\n"])
def test_text_of_other_settings_is_refused(text):
    with pytest.raises(ValueError, match="the text is not of these settings"):
        best_losses(text, SMALL)


def test_more_names_than_a_cast_holds():
    first, second, third, fourth = invent_names(SMALL)[:4]
    text = f"{first} calls {second} .\n{third} calls {fourth} .\n"
    with pytest.raises(ValueError, match=f"with 3 names, found '{fourth}' at word 7"):
        best_losses(text, SMALL)


def test_settings_that_cannot_be():
    with pytest.raises(
        ValueError, match="expected 1 <= cast_size <= num_names <= 4900, found 6 and 5"
    ):
        SyntheticText(num_names=5, cast_size=6)
    with pytest.raises(ValueError, match="expected 1 to 8, found 9"):
        SyntheticText(num_verbs=9)
