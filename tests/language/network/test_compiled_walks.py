"""The compiled walks against the loops, over several pieces; see `test_recurrence.py`, too."""

import itertools

import pytest
import torch

from metalm.language.network import compiled_walks
from metalm.language.network.row_recurrence import RowLSTM
from metalm.training.compiling import OftenCalled

# Of torch itself, while it compiles.
pytestmark = pytest.mark.filterwarnings("default")

TIME, INPUTS, HIDDEN = 12, 3, 4  # pieces of 5, 5, 1 and 1
CASES = [(3, True), (1, True), (5, True), (3, False)]  # rows, weights of their own


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 15, 16, 17, 20, 70, 128])
def test_pieces_are_the_whole_segment_in_few_lengths(time):
    found = list(compiled_walks.pieces(time))
    places = list(itertools.chain.from_iterable(range(time)[piece] for piece in found))
    assert places == list(range(time))
    assert {piece.stop - piece.start for piece in found} <= set(compiled_walks.PIECES)
    assert len(found) <= time // 5 + 4


def derivatives(rows, own, device="cpu"):
    """Outputs, first and second gradients of a segment, weights per row or shared."""
    generator = torch.Generator().manual_seed(rows)

    def leaf(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5
        return values.to(device).requires_grad_()

    lead = (rows,) if own else ()
    leaves = [
        leaf(TIME, rows, INPUTS),
        leaf(rows, HIDDEN),
        leaf(rows, HIDDEN),
        leaf(*lead, 4 * HIDDEN, INPUTS),
        leaf(*lead, 4 * HIDDEN, HIDDEN),
        leaf(*lead, 4 * HIDDEN),
    ]
    outputs, hidden, cell = RowLSTM.apply(torch.float64, *leaves)
    loss = outputs.sin().sum() + (hidden * cell).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(part.pow(3).sum() for part in first), leaves)
    return [part.cpu() for part in (outputs, hidden, cell, *first, *second)]


class Counting:
    """A backend that counts the graphs it compiles."""

    def __init__(self, compile):
        self.compile, self.graphs = compile, 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return self.compile(graph, examples)


def assert_same_as_the_loops(monkeypatch, caplog, compile, cases, device="cpu"):
    expected = [derivatives(*case) for case in cases]
    backends = {}
    monkeypatch.setattr(compiled_walks, "wanted", lambda _: True)
    for name in ("read_piece", "back_piece", "change_piece"):
        function = getattr(compiled_walks, name).function
        backends[name] = Counting(compile)
        monkeypatch.setattr(compiled_walks, name, OftenCalled(function, 0, backends[name]))
    torch.compiler.reset()
    for case, wanted in zip(cases, expected, strict=True):
        for one, other in zip(derivatives(*case, device), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not [record for record in caplog.records if record.name.startswith("metalm")]
    # Two lengths each; back also with what the second derivative adds.
    assert backends["read_piece"].graphs >= 2
    assert backends["change_piece"].graphs >= 2
    assert backends["back_piece"].graphs >= 4


def test_traced_they_equal_the_loops(monkeypatch, caplog):
    assert_same_as_the_loops(monkeypatch, caplog, lambda graph, _: graph, CASES[:1])


@pytest.mark.slow
def test_compiled_they_equal_the_loops(monkeypatch, caplog):
    assert_same_as_the_loops(monkeypatch, caplog, inductor(), CASES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_for_cuda_they_equal_the_loops(monkeypatch, caplog):
    assert_same_as_the_loops(monkeypatch, caplog, inductor(), CASES, "cuda")


def inductor():
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


def test_a_state_in_another_type_is_taken_as_the_loops_take_it(monkeypatch):
    """As layers under autocast leave it."""
    gates, weight = torch.randn(3, 2, 16), torch.randn(2, 16, 4)
    state = torch.randn(2, 4, dtype=torch.bfloat16)
    found = compiled_walks.read(gates, state, state, weight)
    expected = compiled_walks.read(gates, state.float(), state.float(), weight)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
