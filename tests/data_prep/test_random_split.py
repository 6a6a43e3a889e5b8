import pytest

from data_prep.random_split import split_indices


@pytest.mark.parametrize("num_articles", [3, 4, 11, 220])
def test_every_article_is_in_exactly_one_split(num_articles):
    splits = split_indices(num_articles, seed=5)
    together = [index for indices in splits.values() for index in indices]
    assert sorted(together) == list(range(num_articles))
    assert all(splits.values())
    assert splits == split_indices(num_articles, seed=5)


def test_shares_and_seeds():
    splits = split_indices(220, seed=5)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [176, 22, 22]
    assert splits != split_indices(220, seed=6)


def test_too_few_articles():
    with pytest.raises(ValueError, match="expected at least 3, found 2; add articles"):
        split_indices(2, seed=5)
