"""Segments from measured bytes, and memory as the dispatcher sees it."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metalm.meta.module_fork import fork
from metalm.meta.rules import CoordinateRates, GradientDescent
from metalm.meta.segment_length import Budget


class Live(TorchDispatchMode):
    """Peak of the bytes in storages that were made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak(steps, segment, order=2, learned=True, items=60, query=True):
    """Bytes at the peak of a meta-gradient over so many steps and a small query."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 30))
    support, last = torch.randn(items, 30), torch.randn(2, 30)
    slow = dict(module.named_parameters())
    rule = CoordinateRates(slow, 0.01) if learned else GradientDescent(0.01)

    def loss(model, batch):
        return functional.mse_loss(model(batch), batch)

    # Gradients of the leaves exist before, so that they do not count.
    for leaf in (*module.parameters(), *rule.parameters()):
        leaf.grad = torch.zeros_like(leaf)
    with Live() as live:
        fork(module).unroll(
            rule, [*[support] * steps, last], loss, weights=[0.0] * steps + [1.0],
            order=order, segment=segment, update_last=not query,
        ).meta_loss.backward()  # fmt: skip
    return live.peak


def test_least_holds_less_than_any_length():
    steps = 24
    least, whole = peak(steps, "least"), peak(steps, None)
    assert least < 0.9 * min(peak(steps, k) for k in (1, 2, 3, 5))
    assert least < whole / 5


def test_least_where_a_step_weighs_as_much_as_its_weights():
    """Here the first graph has a step more than those that a gradient comes to."""
    found = {k: peak(20, k, items=2, query=False) for k in ("least", 3, 4, 5)}
    assert found.pop("least") < 0.8 * min(found.values())


def test_auto_holds_a_third():
    """Beside the graphs of a third of the steps, what a step needs while it runs."""
    steps = 24
    auto, whole = peak(steps, "auto"), peak(steps, None)
    step = (whole - peak(steps // 2, None)) / (steps // 2)
    assert auto < whole / 3 + 4 * step
    assert auto < 0.5 * whole


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize(("segment", "most"), [("auto", 2 / 3), ("least", 4 / 3)])
def test_how_often_steps_are_taken(segment, most, query):
    """As often as the segment says, and no more; the step that is weighed comes on top."""
    steps, calls = 30, []
    module = nn.Linear(3, 3)

    def loss(model, batch):
        calls.append(1)
        return functional.mse_loss(torch.tanh(model(batch)), batch)

    batches = [torch.randn(40, 3) for _ in range(steps + query)]
    done = fork(module).unroll(
        GradientDescent(0.1), batches, loss, order=2, segment=segment, update_last=not query
    )
    done.meta_loss.backward()
    again = len(calls) - len(batches) - 1
    assert 0.5 * most * steps <= again <= most * steps


def test_a_budget_is_kept_and_used():
    steps = 24
    least, whole = peak(steps, "least"), peak(steps, None)
    budget, step = (least + whole) // 2, (whole - peak(steps // 2, None)) / (steps // 2)
    found = peak(steps, Budget(budget))
    # What a step needs while it runs comes on top of what is kept.
    assert budget - 3 * step < found <= budget + 2 * step
    assert peak(steps, Budget(2 * whole)) == pytest.approx(whole, rel=0.05)


def test_what_a_budget_cannot_hold():
    with pytest.raises(ValueError, match="24 steps do not fit into the budget"):
        peak(24, Budget(2000))


@pytest.mark.parametrize("segment", [None, "auto", "least"])
def test_first_order_at_a_fixed_rate_is_flat(segment):
    """Nothing outlives a step but its loss."""
    few, many = (peak(steps, segment, 1, learned=False) for steps in (8, 40))
    assert few <= many <= few + 32 * 64


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ("most", "expected a number of steps, 'auto', 'least' or a Budget, found 'most'"),
        (Budget(0), "at least 1 byte, found 0"),
        (-1, "at least 1 update, found -1"),
        (1.5, "at least 1 update, found 1.5"),
    ],
)
def test_impossible_segments_are_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        peak(3, segment)
