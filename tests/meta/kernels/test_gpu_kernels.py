"""The kernels in Triton against the same functions in tensor operations.

On a GPU they are compiled, elsewhere Triton's interpreter goes through them; without Triton, which
torch brings along for CUDA only, they are not tested.
"""

import os

import pytest
import torch

from metalm.meta.kernels import tensor_kernels
from metalm.meta.kernels.step_gradients import Steps, TraceSums, Wanted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
gpu_kernels = pytest.importorskip("metalm.meta.kernels.gpu_kernels")

SHAPES = {"number": (), "small": (4, 3), "several blocks": (7, 401)}
EVERYTHING = Wanted(True, True, True, True)


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return draw


def coefficient(kind, shape, normal):
    """None, one number, one a row, or one a coordinate; between 0 and 1."""
    if kind == "none":
        return None
    own = {"one": (), "row": (*shape[:1], *(1,) * (len(shape) - 1)), "coordinate": shape}[kind]
    return normal(*own).sigmoid()


@pytest.mark.parametrize("rate", ["one", "row", "coordinate"])
@pytest.mark.parametrize("decay", ["none", "one", "coordinate"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("start", ["rows", "same row", "no rows", "in place"])
def test_write_step(normal, shape, rate, decay, start):
    slow = normal(*shape)
    rate, decay = (coefficient(kind, shape, normal) for kind in (rate, decay))
    rows = () if start == "no rows" else (11,)
    gradient = normal(*rows, *shape)
    weight = slow.expand(11, *shape) if start == "same row" else normal(*rows, *shape)
    expected, found = torch.empty_like(gradient), torch.empty_like(gradient)
    tensor_kernels.write_step(expected, weight, gradient, slow, rate, decay)
    target = weight if start == "in place" else found
    gpu_kernels.write_step(target, weight, gradient, slow, rate, decay)
    torch.testing.assert_close(target, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("decay", ["none", "one", "coordinate"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("asked", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 0, 0)], ids=str)
def test_write_traced_step(normal, decay, shape, rows, asked):
    """Three steps, which add up, the last from the same row; a trace first, then the sums."""
    slow = normal(*shape)
    full = shape if rows is None else (rows, *shape)
    rate, decay = (coefficient(kind, shape, normal) for kind in ("row", decay))
    start = [normal(*full), normal(*full), *(normal(*shape) for _ in range(3))]
    gradients = [normal(*full), normal(*full), normal(*shape).expand(full)]
    found = []
    for kernels in (tensor_kernels, gpu_kernels):
        own = [tensor.clone() for tensor in start]
        wanted = [part if ask else None for part, ask in zip(own[1:], asked, strict=True)]
        for share, gradient in zip((1.0, 0.3, 0.0), gradients, strict=True):
            kernels.write_traced_step(
                own[0], gradient, slow, rate, decay, wanted[0], TraceSums(*wanted[1:]), share
            )
        found.append(own)
    for expected, one in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    for ask, one, before in zip(asked, found[1][1:], start[1:], strict=True):
        assert ask or torch.equal(one, before)


def agree(steps, incoming, wanted):
    found, expected = (k.sweep(steps, incoming, wanted) for k in (gpu_kernels, tensor_kernels))
    for one, two, asked in zip(found, expected, wanted, strict=True):
        assert (one is not None) == (two is not None) == asked
        if asked:
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("decay", ["none", "one", "coordinate"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("ends", ["open", "same row", "cut"])
def test_sweep(normal, num_steps, decay, shape, rows, ends):
    slow = normal(*shape)
    full = shape if rows is None else (rows, *shape)
    gradients = [normal(*full) for _ in range(num_steps)]
    rate, decay = (coefficient(kind, shape, normal) for kind in ("coordinate", decay))
    incoming = start = None
    if ends == "open":
        incoming, start = normal(*full), normal(*full)
    elif ends == "same row":
        incoming = normal(*shape).expand(full)
    weights = [0.5 + 0.25 * step for step in range(num_steps)]
    agree(Steps(gradients, weights, slow, rate, decay, start, ends == "cut"), incoming, EVERYTHING)


@pytest.mark.parametrize("number", range(4))
def test_one_gradient_alone(normal, number):
    slow, rate, gradient = (normal(5, 4) for _ in range(3))
    steps = Steps([gradient], [1.0], slow, rate, rate, gradient, False)
    agree(steps, slow, Wanted(*(i == number for i in range(4))))


def test_gradients_of_any_layout(normal):
    slow = normal(5, 4)
    gradients = [normal(3, 4, 5).mT, normal(5, 4).expand(3, 5, 4)]
    rate = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    agree(
        Steps(gradients, [1.0, 1.0], slow, rate, rate, gradients[1], False),
        gradients[0],
        EVERYTHING,
    )


def test_float32_and_what_does_not_fit(normal):
    slow, weight, gradient = (normal(6, 4, dtype=torch.float32) for _ in range(3))
    rate = torch.tensor(0.3, device=DEVICE)
    expected, found = torch.empty_like(slow), torch.empty_like(slow)
    tensor_kernels.write_step(expected, weight, gradient, slow, rate, rate)
    gpu_kernels.write_step(found, weight, gradient, slow, rate, rate)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert gpu_kernels.fits(slow) == (DEVICE == "cuda")
    assert not gpu_kernels.fits(slow.mT)
    assert not gpu_kernels.fits(slow.cpu())
    assert not gpu_kernels.fits(slow.bfloat16())
