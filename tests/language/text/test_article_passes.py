import itertools
import json

import numpy as np
import pytest
import torch

from metalm.language.text.article_passes import ArticlePasses

SEED = 4
LENGTHS = (7, 1, 12, 5, 3)


@pytest.fixture
def articles(article_set):
    """Every token stands once in all of the text: 20 times the article plus its position."""
    return article_set([np.arange(n, dtype=np.int32) + 20 * i for i, n in enumerate(LENGTHS)])


def read(passes, steps, segment):
    """(row, token) of every scored token, step after step, row after row."""
    seen = []
    for _ in range(steps):
        passes.rows.enter()
        batch = passes.rows.take(segment)
        for row in range(batch.mask.shape[1]):
            read = batch.mask[:, row] == 1
            seen.append((row, batch.targets[read, row].tolist()))
    return seen


def entries(passes, count, segment=4):
    """The first articles that enter, in order."""
    entered = []
    while len(entered) < count:
        entered += [tokens[0] // 20 for _, tokens in read(passes, 1, segment) if not tokens[0] % 20]
    return entered[:count]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("segment", [1, 4, 30])
def test_every_pass_visits_every_article_once(articles, rows, segment):
    entered = entries(ArticlePasses(articles, rows, SEED), 30, segment)
    passes = [entered[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in passes)
    assert len({tuple(order) for order in passes}) > 1


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_an_article_is_read_whole_in_one_row_before_the_next(articles, rows):
    texts = {row: [] for row in range(rows)}
    for row, tokens in read(ArticlePasses(articles, rows, SEED), 40, 4):
        assert tokens
        texts[row] += tokens
    for text in texts.values():
        starts = [place for place, token in enumerate(text) if token % 20 == 0]
        assert starts[0] == 0
        assert len(starts) > 3
        for start, end in itertools.pairwise(starts):
            article = text[start] // 20
            assert text[start:end] == list(range(20 * article, 20 * article + LENGTHS[article]))


def test_the_order_follows_from_the_seed_and_the_pass_alone(articles):
    expected = entries(ArticlePasses(articles, 1, SEED), 20)
    for rows, segment in ((2, 4), (3, 1), (7, 30)):
        assert entries(ArticlePasses(articles, rows, SEED), 20, segment) == expected
    third = ArticlePasses(articles, 2, SEED)
    third.load_state_dict({"entered": 10, "positions": []})
    assert entries(third, 10) == expected[10:]
    assert entries(ArticlePasses(articles, 1, SEED + 1), 20) != expected


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3, 9, 23])
def test_restored_passes_go_on_as_unbroken_ones(articles, rows, stopped_after):
    unbroken, broken = (ArticlePasses(articles, rows, SEED) for _ in range(2))
    for passes in (unbroken, broken):
        read(passes, stopped_after, 3)
    again = ArticlePasses(articles, rows, SEED)
    read(again, 2, 5)  # what it has read before does not matter
    again.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    for _ in range(20):
        assert unbroken.rows.enter() == again.rows.enter()
        for one, other in zip(unbroken.rows.take(3), again.rows.take(3), strict=True):
            assert torch.equal(one, other)
        assert unbroken.state_dict() == again.state_dict()
