"""Where articles begin, on texts whose beginnings have a form of their own."""

import numpy as np
import pytest
import torch

from metalm.language.reading.article_starts import (
    WINDOW,
    ArticleStarts,
    refuse_no_starts,
    train_article_starts,
    windows_of,
)

VOCABULARY = 40


def text(random):
    """Two ends of line and a 5 begin an article; inside, a 5 follows one end of line, as 0 5 5."""
    body = random.integers(6, VOCABULARY, random.integers(12, 30))
    inside = [*body[:6], 0, 5, 5, *body[6:]]
    return np.array([5, *inside, 0, 0], dtype=np.int32)


@pytest.fixture
def texts():
    random = np.random.default_rng(1)
    return [text(random) for _ in range(90)]


def test_beginnings_that_were_never_seen_are_found(article_set, texts):
    network = train_article_starts(article_set(texts[:60]), VOCABULARY, seed=2)
    stream = np.concatenate(texts[60:]).astype(np.int64)
    begins = np.cumsum([len(each) for each in texts[60:]])[:-1]
    with torch.no_grad():
        scores = network(windows_of(torch.from_numpy(stream)))
    assert len(scores) == len(stream) - WINDOW + 1
    found = scores.gt(0).nonzero().flatten() + WINDOW - 1  # the last token of the window
    assert found.tolist() == (begins + 2).tolist()  # an article's third token


def test_a_window_is_the_last_tokens_in_their_order():
    tokens = torch.arange(24).view(12, 2)
    windows = windows_of(tokens)
    assert windows.shape == (5, 2, WINDOW)
    assert windows[3, 1].tolist() == [7, 9, 11, 13, 15, 17, 19, 21]


def test_a_score_by_hand():
    torch.manual_seed(3)
    network = ArticleStarts(VOCABULARY).double()
    window = torch.randint(VOCABULARY, (WINDOW,))
    seen = torch.cat([network.vectors.weight[int(token)] for token in window])
    hidden = torch.tanh(network.hidden.weight @ seen + network.hidden.bias)
    expected = network.out.weight[0] @ hidden + network.out.bias[0]
    torch.testing.assert_close(network(window), expected)


def test_training_follows_from_the_seed_and_leaves_the_random_state(article_set, texts):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other, third = (
        train_article_starts(article_set(texts[:8]), VOCABULARY, seed=seed) for seed in (2, 2, 3)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert any(not torch.equal(v, third.state_dict()[n]) for n, v in one.state_dict().items())
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_one_article_shows_nothing(article_set, texts):
    with pytest.raises(ValueError, match=r"nothing shows where articles begin; .* found 1 artic"):
        train_article_starts(article_set(texts[:1]), VOCABULARY, seed=2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [(2, 3), (5, 2), (5, 3), (2, 2, 2, 2), (1, 3, 2, 3), (4, 4)])
def test_whether_there_is_a_beginning_to_learn_from(article_set, lengths, seed):
    """By hand: a place whose window of eight tokens ends with the third of an article."""
    articles = article_set([np.arange(length) for length in lengths])
    laid = np.random.default_rng(seed).permutation(len(lengths))
    ends = [sum(lengths[other] for other in laid[:place]) + 3 for place in range(len(laid))]
    seen = [end for end, number in zip(ends, laid, strict=True) if end >= 8 and lengths[number] > 2]
    if seen:
        refuse_no_starts(articles, seed)
        return
    with pytest.raises(ValueError, match="nothing shows where articles begin"):
        refuse_no_starts(articles, seed)
