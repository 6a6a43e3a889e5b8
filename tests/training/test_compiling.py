import pytest
import torch

from metalm.training import compiling
from metalm.training.compiling import OftenCalled

# Of torch itself, while it compiles.
pytestmark = pytest.mark.filterwarnings("default")


def double(values):
    return values * 2


class Backend:
    """Counts what it is given to compile, and hands out something that can be told apart."""

    def __init__(self, refuses=False):
        self.compilations, self.refuses = 0, refuses

    def __call__(self, graph, examples):
        self.compilations += 1
        if self.refuses:
            raise ValueError("no compiler on this machine\nand much more")
        return lambda *values: [part + 100 for part in graph(*values)]


def own_messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("metalm")]


@pytest.fixture(autouse=True)
def anew():
    torch.compiler.reset()


def test_it_is_compiled_after_so_many_calls():
    backend = Backend()
    function = OftenCalled(double, calls=3, backend=backend)
    values = torch.arange(3.0)
    for _ in range(3):
        assert torch.equal(function(values), 2 * values)
    assert backend.compilations == 0
    for _ in range(3):
        assert torch.equal(function(values), 2 * values + 100)
    assert backend.compilations == 1


@pytest.mark.parametrize("by_function", [True, False])
def test_more_shapes_than_torch_compiles_by_itself(by_function, monkeypatch):
    if not by_function:  # as in an older torch
        monkeypatch.setattr(compiling, "_LIMIT", {})
    backend = Backend()
    function = OftenCalled(double, calls=0, backend=backend)
    for dims in range(1, 13):
        values = torch.ones((2,) * dims)
        assert torch.equal(function(values), 2 * values + 100)


def test_where_it_cannot_be_compiled_it_says_so_once_and_goes_on(caplog):
    backend = Backend(refuses=True)
    function = OftenCalled(double, calls=0, backend=backend)
    values = torch.arange(3.0)
    for _ in range(3):
        assert torch.equal(function(values), 2 * values)
    assert backend.compilations == 1
    (message,) = own_messages(caplog)
    assert "torch.compile failed for double, which goes on uncompiled" in message
    assert "no compiler on this machine" in message
    assert "and much more" not in message


def test_an_error_of_the_function_itself_is_its_own(caplog):
    function = OftenCalled(torch.linalg.inv, calls=0, backend="eager")
    with pytest.raises(RuntimeError, match="must be batches of square matrices"):
        function(torch.ones(2, 3))
    assert not own_messages(caplog)


def test_no_memory_is_not_a_fault_of_the_compiler():
    def without_memory(graph, examples):
        def run(*values):
            raise torch.OutOfMemoryError("of 80 GiB, none is free")

        return run

    function = OftenCalled(double, calls=0, backend=without_memory)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            function(torch.ones(1))
