"""Schedules of checkpoints: brute force over all cuts, a walk that counts, revolve's formula."""

import math
from functools import cache

import pytest

from metalm.meta.checkpoint_schedule import (
    Every,
    Fitting,
    StepBytes,
    fitting,
    least_held,
)

SIZES = [(481, 218), (643, 43), (43, 643), (100, 100)]


def walk(schedule, steps, each, scored=False):
    """Goes back through an unroll; returns the order of the steps, those passed over, and peaks.

    The peaks are of the bytes held, with the first graph and with later ones. With a scored loss at
    the end every step is passed over before its graph comes, which weighs nothing here.
    """
    order, passed, peaks = [], 0, [0, 0]
    waiting, (start, stop), first = [], (0, steps), not scored
    if scored and schedule.passed(steps, 0, False):
        while length := schedule.passed(stop - start, len(waiting), False):
            waiting.append((start, start + length))
            start += length
        passed = steps
    while True:
        while length := schedule.passed(stop - start, len(waiting), first):
            assert 0 < length < stop - start
            waiting.append((start, start + length))
            start, passed = start + length, passed + length
        held = max(len(waiting) - 1, 0) * each.checkpoint + (stop - start) * each.graph
        peaks[first] = max(peaks[first], held)
        order += reversed(range(start, stop))
        if not waiting:
            return order, passed, peaks[::-1]
        (start, stop), first = waiting.pop(), False


def brute(steps, each, held, spare):
    """Fewest steps passed over, over every way to cut."""

    @cache
    def cost(steps, waiting, first):
        room = held - max(waiting - 1, 0) * each.checkpoint
        if room < each.graph:
            return math.inf
        if (steps - first * spare) * each.graph <= room:
            return 0
        return min(
            (m + cost(steps - m, waiting + 1, first) + cost(m, waiting, False))
            for m in range(1, steps)
        )

    return cost(steps, 0, True)


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("steps", [2, 7, 16])
@pytest.mark.parametrize(("graph", "checkpoint"), SIZES)
def test_the_fewest_steps_that_fit(graph, checkpoint, steps, spare):
    each = StepBytes(graph, checkpoint)
    for held in range(graph, steps * graph + 1, max(7, graph // 3)):
        schedule = Fitting(steps, each, held, spare)
        order, passed, (first, later) = walk(schedule, steps, each)
        assert order == list(reversed(range(steps)))
        assert passed == schedule.cost == brute(steps, each, held, spare)
        assert later <= held
        assert first <= held + spare * graph
        if not spare:
            scored = Fitting(steps, each, held, scored=True)
            order, passed, peaks = walk(scored, steps, each, scored=True)
            assert order == list(reversed(range(steps)))
            assert passed == scored.cost
            assert max(peaks) <= held
    assert Fitting(steps, each, graph - 1).cost == math.inf


@pytest.mark.parametrize("waiting", [1, 2, 5])
@pytest.mark.parametrize("steps", [2, 3, 21, 40])
def test_graphs_of_one_step_as_in_revolve(steps, waiting):
    """Griewank and Walther (2000): r n - binomial(c + r, r - 1) for n steps and c checkpoints."""
    each = StepBytes(1000, 1)  # a graph of two steps never has room
    repeats = next(r for r in range(1, steps + 1) if math.comb(waiting + r, waiting) >= steps)
    fewest = repeats * steps - math.comb(waiting + repeats, repeats - 1)
    assert Fitting(steps, each, 1000 + waiting - 1).cost == fewest


@pytest.mark.parametrize("passes", [2 / 3, 4 / 3])
@pytest.mark.parametrize("steps", [2, 5, 16, 50])
@pytest.mark.parametrize(("graph", "checkpoint"), SIZES)
def test_the_least_memory_for_so_many_passes(graph, checkpoint, steps, passes):
    each = StepBytes(graph, checkpoint)
    held = least_held(steps, each, passes)
    assert Fitting(steps, each, held).cost <= passes * steps
    assert Fitting(steps, each, held - 1).cost > passes * steps
    # In equal parts every step but the last part's is passed over once.
    one_level = min(
        (parts - 1) * checkpoint + k * graph
        for k in range(1, steps + 1)
        if steps - steps % k - (0 if steps % k else k) <= passes * steps
        for parts in [math.ceil(steps / k)]
    )
    assert held <= one_level
    assert fitting(steps, each, held) is fitting(steps, each, held)


def test_a_long_unroll_is_planned_in_units():
    steps, each = 1000, StepBytes(643, 43)
    order, passed, peaks = walk(
        fitting(steps, each, held := least_held(steps, each, 4 / 3)), steps, each
    )
    assert order == list(reversed(range(steps)))
    assert passed <= 4 / 3 * steps
    assert max(peaks) <= held < min(steps // k * 43 + k * 643 for k in range(1, 200))


def test_what_weighs_nothing_is_kept():
    each = StepBytes(0, 5)
    assert walk(fitting(20, each, least_held(20, each, 4 / 3)), 20, each) == (
        [*range(20)][::-1],
        0,
        [0, 0],
    )


def test_every_so_many():
    each = StepBytes(10, 3)
    order, passed, peaks = walk(Every(3), 11, each)
    assert order == list(reversed(range(11)))
    assert passed == 9
    assert max(peaks) == 3 * 10 + 1 * 3
