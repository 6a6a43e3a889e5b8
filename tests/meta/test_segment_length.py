"""How long segments should be: brute force over all lengths, and bytes counted at dispatch."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metalm.meta.module_fork import fork
from metalm.meta.rules import CoordinateRates, GradientDescent
from metalm.meta.segment_length import Budget, StepBytes


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 200])
@pytest.mark.parametrize(("graph", "checkpoint"), [(6430, 430), (430, 6430), (100, 100), (0, 5)])
def test_the_least_of_all_lengths(graph, checkpoint, steps):
    """k near sqrt(T P / A) holds as little as the best of all, up to the rounding of T / k."""
    step = StepBytes(graph, checkpoint)
    held = [math.ceil(steps / k) * checkpoint + k * graph for k in range(1, steps + 1)]
    assert step.held(steps, step.least(steps)) <= 1.15 * min(held)
    budget = 3 * min(held)
    fitting = [k for k, size in enumerate(held, 1) if size <= budget]
    assert step.within(steps, Budget(budget)) == max(fitting)
    with pytest.raises(ValueError, match=f"at most {min(held) - 1} bytes, found"):
        step.within(steps, Budget(min(held) - 1))


def test_published_example():
    """Conv4: A = 6.43, P = 0.43 MiB, T = 50; measured least at k = 2."""
    assert StepBytes(6430, 430).least(50) == 2


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


def peak(steps, segment, order=2, learned=True):
    """Bytes at the peak of a meta-gradient over so many steps and a small query."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 30))
    support, query = torch.randn(60, 30), torch.randn(2, 30)
    slow = dict(module.named_parameters())
    rule = CoordinateRates(slow, 0.01) if learned else GradientDescent(0.01)

    def loss(model, batch):
        return functional.mse_loss(model(batch), batch)

    # Gradients of the leaves exist before, so that they do not count.
    for leaf in (*module.parameters(), *rule.parameters()):
        leaf.grad = torch.zeros_like(leaf)
    with Live() as live:
        fork(module).unroll(
            rule, [support] * steps + [query], loss, weights=[0.0] * steps + [1.0],
            order=order, segment=segment, update_last=False,
        ).meta_loss.backward()  # fmt: skip
    return live.peak


def test_auto_holds_about_the_least():
    steps = 24
    auto, whole = peak(steps, "auto"), peak(steps, None)
    # The first segment, which is weighed, is one checkpoint more than a known length needs.
    assert auto <= 1.1 * min(peak(steps, k) for k in range(1, 9))
    assert auto < whole / 3


def test_a_budget_is_kept_and_used():
    steps = 24
    least, whole = peak(steps, "auto"), peak(steps, None)
    budget, step = (least + whole) // 2, (whole - peak(steps // 2, None)) / (steps // 2)
    found = peak(steps, Budget(budget))
    # What a step needs while it runs comes on top of what is kept.
    assert budget - 3 * step < found <= budget + 2 * step
    assert peak(steps, Budget(2 * whole)) == pytest.approx(whole, rel=0.05)


def test_what_a_budget_cannot_hold():
    with pytest.raises(ValueError, match="23 steps do not fit into the budget"):
        peak(24, Budget(2000))


@pytest.mark.parametrize("segment", [None, "auto"])
def test_first_order_at_a_fixed_rate_is_flat(segment):
    """Nothing outlives a step but its loss."""
    few, many = (peak(steps, segment, 1, learned=False) for steps in (8, 40))
    assert few <= many <= few + 32 * 64


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ("least", "expected a number of steps, 'auto' or a Budget, found 'least'"),
        (Budget(0), "at least 1 byte, found 0"),
        (-1, "at least 1 update, found -1"),
    ],
)
def test_impossible_segments_are_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        peak(3, segment)
