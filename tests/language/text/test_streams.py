import numpy as np
import pytest
import torch

from metalm.language.text.articles import ArticleSet
from metalm.language.text.streams import TokenStreams

SEED = 4


def laid_end_to_end(texts, number):
    order = np.random.default_rng([SEED, number]).permutation(len(texts))
    return np.concatenate([texts[index] for index in order])


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 4, 100])
def test_every_token_is_a_target_once_after_the_one_before_it(texts, article_set, rows, length):
    streams = TokenStreams(article_set(texts), rows, SEED, 2)
    text = laid_end_to_end(texts, 2)
    assert streams.length == len(text) // rows
    starts = range(0, streams.length, length)
    parts = [streams.segment(start, length) for start in starts]
    inputs, targets = (torch.cat(part).T.flatten().numpy() for part in zip(*parts, strict=True))
    used = rows * streams.length
    np.testing.assert_array_equal(targets, text[:used])
    np.testing.assert_array_equal(inputs, np.concatenate(([0], text))[:used])
    assert len(text) - used < rows


def test_a_pass_follows_from_the_seed_and_its_number(texts, article_set):
    articles = article_set(texts)
    first, again, next_pass = (TokenStreams(articles, 2, SEED, number) for number in (0, 0, 1))
    assert torch.equal(first.segment(3, 5)[0], again.segment(3, 5)[0])
    assert not torch.equal(first.segment(0, 18)[1], next_pass.segment(0, 18)[1])
    counts = [np.bincount(s.segment(0, 18)[1].flatten(), minlength=11) for s in (first, next_pass)]
    np.testing.assert_array_equal(*counts)


def test_articles_in_their_own_order(texts, article_set):
    streams = TokenStreams(article_set(texts), 3, SEED, 2, shuffled=False)
    inputs, targets = streams.segment(0, 100)
    text = np.concatenate(texts)
    np.testing.assert_array_equal(targets.T.flatten(), text)
    np.testing.assert_array_equal(inputs.T.flatten(), np.concatenate(([0], text[:-1])))


def test_only_the_articles_of_a_segment_are_read(texts, article_set, monkeypatch):
    """Five articles, 36 tokens, two rows of 18."""
    read = []
    tokens = ArticleSet.tokens

    def recording(articles, index):
        read.append(len(tokens(articles, index)))
        return tokens(articles, index)

    monkeypatch.setattr(ArticleSet, "tokens", recording)
    streams = TokenStreams(article_set(texts), 2, SEED, 2)
    assert read == []
    streams.segment(3, 2)
    ends = np.cumsum(streams._articles.lengths)
    first, second = (int(np.searchsorted(ends, at, side="right")) for at in (2, 18 + 2))
    assert read[0] == streams._articles.lengths[first]
    assert streams._articles.lengths[second] in read
    assert len(read) <= 4


def test_too_little_text_for_the_rows(texts, article_set):
    message = "too little text for 19 rows; expected at least 38 tokens, found 36"
    with pytest.raises(ValueError, match=message):
        TokenStreams(article_set(texts), 19, SEED, 0)
