"""The fused kernels against the same functions in tensor operations."""

import pytest
import torch

from metalm.meta.kernels import cpu_kernels, tensor_kernels
from metalm.meta.kernels.step_gradients import Steps, TraceSums, Wanted

# Longer than a block of either kernel, and no multiple of anything.
LONG = cpu_kernels.STEP_BLOCK + 3 * cpu_kernels.SWEEP_BLOCK + 41
SHAPES = {"number": (), "small": (4, 3), "long": (LONG,), "wide": (7, 1001)}


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(generator, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


def coefficient(kind, shape, generator):
    """None, one number, one a row, or one a coordinate; between 0 and 1."""
    if kind == "none":
        return None
    own = {"one": (), "row": (*shape[:1], *(1,) * (len(shape) - 1)), "coordinate": shape}[kind]
    return torch.rand(own, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rate", ["one", "row", "coordinate"])
@pytest.mark.parametrize("decay", ["none", "one", "coordinate"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("start", ["rows", "same row", "no rows", "in place"])
def test_write_step(shape, rate, decay, start, threads):
    generator = torch.Generator().manual_seed(1)
    slow = normal(generator, *shape)
    rate, decay = (coefficient(kind, shape, generator) for kind in (rate, decay))
    rows = () if start == "no rows" else (3,)
    gradient = normal(generator, *rows, *shape)
    weight = slow.expand(3, *shape) if start == "same row" else normal(generator, *rows, *shape)
    expected, found = torch.empty_like(gradient), torch.empty_like(gradient)
    tensor_kernels.write_step(expected, weight, gradient, slow, rate, decay)
    target = weight if start == "in place" else found
    cpu_kernels.write_step(target, weight, gradient, slow, rate, decay)
    torch.testing.assert_close(target, expected, rtol=1e-13, atol=1e-14)


EVERYTHING = Wanted(True, True, True, True)


def agree(steps, incoming, wanted):
    found, expected = (k.sweep(steps, incoming, wanted) for k in (cpu_kernels, tensor_kernels))
    for one, two, asked in zip(found, expected, wanted, strict=True):
        assert (one is not None) == (two is not None) == asked
        if asked:
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4, 8, 17])
@pytest.mark.parametrize("decay", ["none", "one", "coordinate"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("ends", ["open", "same row", "cut"])
def test_sweep(num_steps, decay, shape, rows, ends, threads):
    generator = torch.Generator().manual_seed(2)
    slow = normal(generator, *shape)
    full = shape if rows is None else (rows, *shape)
    gradients = [normal(generator, *full) for _ in range(num_steps)]
    rate, decay = (coefficient(kind, shape, generator) for kind in ("coordinate", decay))
    incoming = start = None
    if ends == "open":
        incoming, start = normal(generator, *full), normal(generator, *full)
    elif ends == "same row":
        incoming = normal(generator, *shape).expand(full)
    weights = [0.5 + 0.25 * step for step in range(num_steps)]
    steps = Steps(gradients, weights, slow, rate, decay, start, ends == "cut")
    agree(steps, incoming, EVERYTHING)


@pytest.mark.parametrize("number", range(4))
def test_one_gradient_alone(number):
    generator = torch.Generator().manual_seed(5)
    slow, rate, gradient = (normal(generator, 5, 4) for _ in range(3))
    steps = Steps([gradient], [1.0], slow, rate, rate, gradient, False)
    agree(steps, slow, Wanted(*(i == number for i in range(4))))


def test_gradients_of_any_layout():
    generator = torch.Generator().manual_seed(3)
    slow = normal(generator, 5, 4)
    gradients = [normal(generator, 3, 4, 5).mT, normal(generator, 5, 4).expand(3, 5, 4)]
    rate = torch.tensor(0.3, dtype=torch.float64)
    steps = Steps(gradients, [1.0, 1.0], slow, rate, rate, gradients[1], False)
    agree(steps, gradients[0], EVERYTHING)


def test_float32_and_what_does_not_fit():
    generator = torch.Generator().manual_seed(4)
    slow, weight, gradient = (normal(generator, 6, 4, dtype=torch.float32) for _ in range(3))
    rate = torch.tensor(0.3)
    expected, found = torch.empty_like(slow), torch.empty_like(slow)
    tensor_kernels.write_step(expected, weight, gradient, slow, rate, rate)
    cpu_kernels.write_step(found, weight, gradient, slow, rate, rate)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert cpu_kernels.fits(slow)
    assert not cpu_kernels.fits(slow.mT)
    assert not cpu_kernels.fits(slow[:0])
    assert not cpu_kernels.fits(slow.bfloat16())
    assert not cpu_kernels.fits(slow.to("meta"))


@pytest.mark.parametrize("decay", ["none", "one", "coordinate"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("asked", [(True,) * 4, (False, True, False, True), (True,) + (False,) * 3])
def test_write_traced_step(decay, shape, rows, asked, threads):
    """Three steps, which add up; a trace is asked for first, then the sums."""
    generator = torch.Generator().manual_seed(6)
    slow = normal(generator, *shape)
    full = shape if rows is None else (rows, *shape)
    rate, decay = (coefficient(kind, shape, generator) for kind in ("row", decay))
    weight, trace, *gradients = (normal(generator, *full) for _ in range(5))
    sums = [normal(generator, *shape) for _ in range(3)]
    found = []
    for kernels in (tensor_kernels, cpu_kernels):
        own = [tensor.clone() for tensor in (weight, trace, *sums)]
        asked_for = [part if ask else None for part, ask in zip(own[1:], asked, strict=True)]
        for share, gradient in zip((1.0, 0.5, 0.0), gradients, strict=True):
            kernels.write_traced_step(
                own[0], gradient, slow, rate, decay, asked_for[0], TraceSums(*asked_for[1:]), share
            )
        found.append(own)
    for expected, one in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    for ask, one, before in zip(asked, found[1][1:], (trace, *sums), strict=True):
        if not ask:
            assert torch.equal(one, before)
