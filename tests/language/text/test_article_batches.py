import itertools

import numpy as np
import pytest
import torch

from metalm.language.network.recurrence import LayerState
from metalm.language.text.article_batches import ArticleRows, select_rows, set_rows

END_OF_LINE = 0


def read_all(rows, segment, start=True):
    """(article, position, input, target) of every scored token, in the order of reading."""
    if start:
        rows.enter()
    seen = []
    while len(rows) > 0:
        places = rows.positions
        batch = rows.take(segment)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
        assert 1 <= len(batch.mask) <= segment
        assert batch.mask.sum(0).max() == len(batch.mask)
        for row, (article, position) in enumerate(places):
            count = int(batch.mask[:, row].sum())
            assert batch.mask[:count, row].all()
            assert count >= 1
            for step in range(count):
                pair = int(batch.inputs[step, row]), int(batch.targets[step, row])
                seen.append((article, position + step, *pair))
        rows.enter()
        rows.leave()
    return seen


def brute_force(texts, order):
    return [
        (article, position, int(([END_OF_LINE, *texts[article]])[position]), int(token))
        for article in order
        for position, token in enumerate(texts[article])
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("segment", [1, 4, 50])
def test_every_token_is_read_once_after_the_token_before_it(texts, rows, segment):
    order = [3, 0, 4, 2, 1]
    found = read_all(ArticleRows(texts, iter(order), rows), segment)
    assert sorted(found) == sorted(brute_force(texts, order))
    for article in order:
        positions = [place for name, place, *_ in found if name == article]
        assert positions == sorted(positions)


def test_rows_are_filled_in_order_and_leave_when_nothing_waits():
    texts = [np.full(length, 7, np.int32) for length in (3, 6, 2, 1)]
    rows = ArticleRows(texts, iter(range(4)), 2)
    assert rows.enter() == [0, 1]
    rows.take(4)
    assert rows.positions == [(0, 3), (1, 4)]
    assert rows.leave() == [1] or rows.positions  # an ended row waits for its successor
    rows = ArticleRows(texts, iter(range(4)), 2)
    rows.enter()
    rows.take(4)
    assert rows.enter() == [0]
    assert rows.positions == [(2, 0), (1, 4)]
    assert rows.leave() is None
    rows.take(4)
    assert rows.enter() == [0]
    assert rows.positions == [(3, 0), (1, 6)]
    assert rows.leave() == [0]
    assert len(rows) == 1
    rows.take(4)
    assert rows.enter() == []
    assert rows.leave() == []
    assert len(rows) == 0


def test_a_row_that_has_ended_is_padding(texts):
    rows = ArticleRows(texts, iter([1, 0]), 2)
    rows.enter()
    rows.take(4)
    batch = rows.take(4)
    assert batch.mask.sum(0).tolist() == [0, 3]
    assert batch.inputs[:, 0].tolist() == batch.targets[:, 0].tolist() == [END_OF_LINE] * 3


@pytest.mark.parametrize("segment", [1, 4, 50])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_that_carries_on_reads_articles_as_one_text(texts, rows, segment):
    order = [3, 0, 4, 2, 1]
    reading = ArticleRows(texts, itertools.cycle(order), rows, carry_rows=1)
    found = []
    entered = reading.enter()
    while len(found) < 200:
        batch = reading.take(segment)
        assert batch.mask[:, 0].all()
        found += zip(batch.inputs[:, 0].tolist(), batch.targets[:, 0].tolist(), strict=True)
        again = reading.enter()
        assert 0 not in again
        entered += again
    if rows == 1:  # otherwise the other row takes some
        text = np.tile(np.concatenate([texts[number] for number in order]), 20)[: len(found)]
        assert [target for _, target in found] == text.tolist()
    assert [token for token, _ in found] == [END_OF_LINE, *(target for _, target in found)][:-1]
    assert entered.count(0) == 1
    assert (entered.count(1) > 1) == (rows == 2)


@pytest.mark.parametrize("stopped_after", [1, 2, 4])
def test_restored_rows_go_on_as_unbroken_ones(texts, stopped_after):
    def advance(rows, times):
        for _ in range(times):
            rows.take(3)
            rows.enter()
            rows.leave()

    endless = [0, 2, 4, 1, 3]
    unbroken = ArticleRows(texts, itertools.cycle(endless), 3)
    entered = iter(itertools.cycle(endless))
    broken = ArticleRows(texts, entered, 3)
    for rows in (unbroken, broken):
        rows.enter()
        advance(rows, stopped_after)
    again = ArticleRows(texts, entered, 3)
    again.restore([list(place) for place in broken.positions])
    for _ in range(6):
        for one, other in zip(unbroken.take(3), again.take(3), strict=True):
            assert torch.equal(one, other)
        assert unbroken.enter() == again.enter()


def tree():
    values = torch.arange(12.0).reshape(4, 3)
    return {"a": values, "b": (LayerState(values + 20, values + 40), None)}


def test_select_rows_keeps_these_rows_of_every_tensor():
    chosen = select_rows(tree(), [2, 0])
    assert torch.equal(chosen["a"], torch.tensor([[6.0, 7, 8], [0, 1, 2]]))
    assert isinstance(chosen["b"][0], LayerState)
    assert torch.equal(chosen["b"][0].cell, chosen["a"] + 40)
    assert chosen["b"][1] is None


def test_set_rows_writes_these_rows_only():
    target = tree()
    value = {"a": torch.tensor([1.0, 2, 3]), "b": (LayerState(torch.zeros(3), torch.ones(3)), None)}
    set_rows(target, [3, 1], value)
    expected = tree()
    for row in (3, 1):
        expected["a"][row] = value["a"]
        expected["b"][0].hidden[row] = 0
        expected["b"][0].cell[row] = 1
    assert torch.equal(target["a"], expected["a"])
    for one, other in zip(target["b"][0], expected["b"][0], strict=True):
        assert torch.equal(one, other)
