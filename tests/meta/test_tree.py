"""Trees of tensors keep their form."""

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
