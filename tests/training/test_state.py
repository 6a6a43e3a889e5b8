"""Trees come back as they went; random generators continue where they were."""

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from metalm.training.checkpoint import load, save
from metalm.training.state import (
    pack,
    preserved_random_states,
    random_states,
    restore_random_states,
    unpack,
)


class Hidden(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


def same(left, right) -> bool:
    """Equal in type, form and every bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        pairs = zip(left, right, strict=True)
        return type(left) is type(right) and all(same(*pair) for pair in pairs)
    return type(left) is type(right) and left == right


TREES = [
    {"a": torch.arange(3.0), "b": [1, 2.5, None, True, "x"], "c": (torch.tensor(4), ())},
    {0: {"step": torch.tensor(3.0)}, 1.5: "y", None: [], True: {}},
    {"a.b": torch.zeros(2), "a": {"b": torch.ones(3)}},
    {"__tensor__": "a", "b": {"__tuple__": 1, "__items__": torch.ones(1)}},
    [float("inf"), 0.1 + 0.2, 2**200, -0.0],
    torch.ones(2, 3, dtype=torch.bfloat16),
    7,
]


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_survives_the_file(tree, tmp_path):
    save(tmp_path / "x", *pack(tree))
    assert same(unpack(*load(tmp_path / "x")), tree)


def test_a_named_tuple_comes_back_as_a_tuple():
    hidden = Hidden(torch.ones(2), torch.zeros(3))
    assert same(Hidden(*unpack(*pack(hidden))), hidden)


def test_an_optimizer_survives(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.95))
    weight.sum().backward()
    optimizer.step()
    save(tmp_path / "x", *pack(optimizer.state_dict()))
    assert same(unpack(*load(tmp_path / "x")), optimizer.state_dict())


def test_tensors_leave_their_history():
    tensors, _ = pack({"a": torch.ones(2, requires_grad=True) * 2})
    assert not tensors["a"].requires_grad


@pytest.mark.parametrize("leaf", [object(), {1, 2}, np.float64(1.0), np.zeros(2)])
def test_an_unknown_leaf_is_named_by_its_path(leaf):
    with pytest.raises(ValueError, match=r"cannot save the state: 'rows\.1\.left'"):
        pack({"rows": [0, {"left": leaf}]})


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"key .* at 'a' is a tuple"):
        pack({"a": {(1, 2): 3}})


def test_foreign_meta_and_missing_tensors_are_refused():
    with pytest.raises(ValueError, match=r"expected meta with the key 'tree', found \['step'\]"):
        unpack({}, {"step": 1})
    with pytest.raises(ValueError, match="expected a tensor named 'a'"):
        unpack({}, pack({"a": torch.ones(1)})[1])


def draw() -> tuple[float, float, float, float]:
    normal = np.random.normal()  # noqa: NPY002
    return torch.rand(()).item(), random.random(), float(normal), random.gauss(0, 1)


def test_random_numbers_continue_where_they_were(tmp_path):
    draw()  # an odd number of normal draws: Python and NumPy hold a second one back
    save(tmp_path / "x", *pack(random_states()))
    expected = [draw() for _ in range(3)]
    restore_random_states(unpack(*load(tmp_path / "x")))
    assert [draw() for _ in range(3)] == expected


def test_what_runs_inside_leaves_the_generators_alone():
    states = random_states()
    expected = draw()
    restore_random_states(states)

    def draw_and_fail():
        with preserved_random_states():
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        draw_and_fail()
    assert draw() == expected
