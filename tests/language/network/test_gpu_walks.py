"""The walks in Triton against the loops of `row_walks.py`.

See `tests/meta/kernels/test_gpu_kernels.py`.
"""

import os

import pytest
import torch

from metalm.language.network.row_walks import Walk, read, slopes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
gpu_walks = pytest.importorskip("metalm.language.network.gpu_walks")

# Time, rows, inputs and units: several blocks of all, one row, and fewer units than a block.
SIZES = [(4, 3, 5, 150), (2, 1, 7, 33), (3, 2, 4, 8)]


def agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("own", [True, False], ids=["own weights", "shared weight"])
@pytest.mark.parametrize(("time", "rows", "inputs", "hidden"), SIZES, ids=str)
def test_forth_and_back(time, rows, inputs, hidden, own):
    generator = torch.Generator().manual_seed(hidden)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

    given, h, c = normal(time, rows, inputs), normal(rows, hidden), normal(rows, hidden)
    own_weight, bias = normal(rows, 4 * hidden, inputs), normal(rows, 4 * hidden)
    weight = normal(*((rows,) if own else ()), 4 * hidden, hidden) / hidden**0.5
    reading = read(torch.float64, given, h, c, own_weight, weight, bias)
    gates = torch.einsum("tri,roi->tro", given, own_weight) + bias
    there = [tensor.to(DEVICE) for tensor in (gates, h, c, weight)]
    agree(gpu_walks.read(*there), (reading.gates, reading.hiddens, reading.cells))

    slopes = slopes_of(reading)
    to_hiddens, dh, dc = normal(time, rows, hidden), normal(rows, hidden), normal(rows, hidden)
    walked = Walk(to_hiddens, dh, dc).back(reading, slopes, record=False)
    there = [tensor.to(DEVICE) for tensor in (to_hiddens, dh, dc, *slopes, weight)]
    da, *before = gpu_walks.walk_back(*there)
    agree((da.flatten(2), *before), (walked.gates, walked.hidden, walked.cell))


def test_what_fits():
    steps, weight = torch.zeros(2, 3, 8, device=DEVICE), torch.zeros(3, 8, 2, device=DEVICE)
    on_gpu = DEVICE == "cuda"
    assert gpu_walks.fits(steps, weight) == on_gpu
    assert gpu_walks.fits(steps, weight[0].bfloat16()) == on_gpu  # shared, under autocast
    assert not gpu_walks.fits(steps, weight.bfloat16())
    assert not gpu_walks.fits(steps.cpu(), weight.cpu())
    assert not gpu_walks.fits(steps[:0], weight)
