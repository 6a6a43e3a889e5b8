"""What happens where no graph can be had; with a GPU, see `tests/language/test_on_cuda.py`."""

import logging
from contextlib import nullcontext

import pytest
import torch

from metalm.training.captured import NO_GRAPHS, Captured


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Fails while something is captured, as CUDA does where that is not allowed."""

    def capture_begin(self, pool):
        pass

    def capture_end(self):
        raise RuntimeError("capture was invalidated")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("metalm.training.captured._aside", Stream)
    for name, value in {
        "graph_pool_handle": lambda: 0,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_what_cannot_be_captured_is_done_as_it_stands(caplog):
    calls = []

    def function(tensor):
        calls.append(tensor)
        return (2 * tensor,)

    captured = Captured(function)
    with caplog.at_level(logging.WARNING):
        for number in (1.0, 3.0, 5.0, 7.0):
            (found,) = captured(torch.tensor([number]))
            assert found.tolist() == [2 * number]
    assert caplog.text.count("capture was invalidated") == 1  # said once, tried once
    assert len(calls) == 4 + 1  # each call, and the one that was to be captured


def test_a_shape_is_captured_after_as_many_calls_as_it_was_given_patience(monkeypatch):
    captures = []

    class Counting(Graph):
        def capture_begin(self, pool):
            captures.append(pool)

        def capture_end(self):
            pass

        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counting)
    calls = []

    def function(tensor):
        calls.append(len(tensor))
        return (2 * tensor,)

    captured = Captured(function, patience=3)
    for _ in range(3):
        assert captured(torch.ones(1))[0].tolist() == [2.0]
    assert calls == [1, 1, 1]
    assert not captures
    for _ in range(2):  # captured once; what is replayed here is nothing
        captured(torch.ones(1))
    assert calls == [1, 1, 1, 1]
    assert len(captures) == 1
    captured(torch.ones(2))  # another shape has patience of its own
    assert calls[-1] == 2
    assert len(captures) == 1


def test_nothing_is_captured_where_nobody_wants_it(monkeypatch):
    def function(tensor):
        return (2 * tensor,)

    captures = []
    monkeypatch.setattr(Graph, "capture_begin", lambda graph, pool: captures.append(pool))
    for wanted, count in ((False, 0), (True, 1)):
        if wanted:
            monkeypatch.delenv(NO_GRAPHS)
        else:
            monkeypatch.setenv(NO_GRAPHS, "1")
        captured = Captured(function)
        for number in (1.0, 3.0, 5.0):
            assert captured(torch.tensor([number]))[0].tolist() == [2 * number]
        assert len(captures) == count


def test_the_first_fault_is_what_is_said(caplog):
    def function(tensor):
        if len(calls) >= 2:
            raise RuntimeError("operation not permitted")
        calls.append(tensor)
        return (tensor,)

    calls = []
    captured = Captured(function)
    captured(torch.ones(1)), captured(torch.ones(1))
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(torch.ones(1))
    assert "operation not permitted" in caplog.text
    assert "invalidated" not in caplog.text


def test_memory_that_is_full_is_no_reason_to_go_on():
    def function(tensor):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        Captured(function)(torch.ones(1))
