"""Trees of tensors keep their form."""

from collections import UserDict
from typing import NamedTuple

import torch

from metalm.meta import tree


class State(NamedTuple):
    hidden: torch.Tensor
    rest: object


def test_every_form_is_kept():
    one, two, three = (torch.full((n,), float(n), requires_grad=True) for n in (1, 2, 3))
    forest = State(one * 2, [{"a": two * 2, "b": None}, ("text", three * 2, 7)])
    assert [t.tolist() for t in tree.tensors(forest)] == [[2], [4, 4], [6, 6, 6]]
    bare = tree.detach(forest)
    assert isinstance(bare, State)
    assert bare.rest[0]["b"] is None
    assert bare.rest[1][0] == "text"
    assert isinstance(bare.rest[1], tuple)
    assert not any(t.requires_grad for t in tree.tensors(bare))
    new = [t + 1 for t in tree.tensors(bare)]
    again = tree.replace(forest, new)
    assert all(a is b for a, b in zip(tree.tensors(again), new, strict=True))


def test_mappings_of_every_type_are_known():
    found = UserDict({"a": torch.ones(2), "b": [torch.zeros(1), "word"]})
    assert [tensor.tolist() for tensor in tree.tensors(found)] == [[1.0, 1.0], [0.0]]
    doubled = tree.transform(found, lambda tensor: tensor + 1)
    assert doubled["a"].tolist() == [2.0, 2.0]
    assert doubled["b"][1] == "word"
    assert tree.form(found) == tree.form({"a": torch.zeros(2), "b": [torch.ones(1), "word"]})


def test_join_lays_rows_behind_each_other_and_write_puts_them_into_views():
    parts = [
        State(torch.ones(2, 3), [torch.full((2,), 5.0), "a"]),
        State(torch.zeros(1, 3), [torch.ones(1), "b"]),
    ]
    whole = tree.join(parts)
    assert whole.hidden.tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert (whole.rest[0].tolist(), whole.rest[1]) == ([5.0, 5.0, 1.0], "a")
    assert tree.join(parts[:1]) is parts[0]
    tree.write(tree.transform(whole, lambda tensor: tensor[1:2]), parts[1])
    assert whole.hidden.tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
    assert whole.rest[0].tolist() == [5.0, 1.0, 1.0]
