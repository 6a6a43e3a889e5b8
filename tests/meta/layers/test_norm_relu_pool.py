"""One operation against the three modules of torch that it stands for, and finite differences."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from metalm.meta.layers.norm_relu_pool import NormReluPool
from metalm.meta.module_fork import fork
from metalm.meta.rules import GradientDescent

ITEMS, CHANNELS, TASKS = 4, 3, 5
SIDES = [(6, 4), (5, 7), (3, 2)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Three(nn.BatchNorm2d):
    """Batch normalisation, ReLU and maxima, each an operation of torch's own."""

    def __init__(self, channels, window, **options):
        super().__init__(channels, **options)
        self.window = window

    def forward(self, x):
        maps = functional.relu(super().forward(x))
        return maps if self.window == 1 else functional.max_pool2d(maps, self.window)


def both(window, dtype=torch.float64, training=True, **options):
    """The operation and the three, with the same numbers; a rate is negative, another is zero."""
    made = [kind(CHANNELS, window, **options).to(dtype) for kind in (NormReluPool, Three)]
    for module in made:
        with torch.no_grad():
            if module.affine:
                module.weight.copy_(torch.tensor([0.7, -1.9, 0.0]))
                module.bias.copy_(torch.tensor([0.2, 0.3, 0.1]))
            if module.track_running_stats:
                module.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
                module.running_var.copy_(torch.tensor([0.5, 1.5, 1.0]))
        module.train(training)
    return made


def is_one_operation(module, x):
    return module(x).grad_fn.name().startswith("_NormReluPool")


def derivatives(module, x):
    """Output; gradients of a weighted sum of it; and those of a weighted sum of these."""
    x = x.clone().requires_grad_()
    y = module(x)
    pushed = normal(*y.shape, seed=1, dtype=x.dtype).requires_grad_()
    first = torch.autograd.grad((y * pushed).sum(), [x, *module.parameters()], create_graph=True)
    along = [normal(*g.shape, seed=seed, dtype=x.dtype) for seed, g in enumerate(first, 2)]
    total = sum((g * a).sum() for g, a in zip(first, along, strict=True))
    second = torch.autograd.grad(total, [x, module.weight, pushed])
    return [y.detach(), *(g.detach() for g in first), *second]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("running", "training"), [(False, True), (True, True), (True, False)])
def test_numbers_and_both_derivatives(sides, window, running, training):
    options = {"track_running_stats": running, "eps": 0.03}
    one, three = both(window, training=training, **options)
    x = normal(ITEMS, CHANNELS, *sides)
    assert is_one_operation(one, x.clone().requires_grad_())
    for found, expected in zip(derivatives(one, x), derivatives(three, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivative_by_finite_differences(training):
    one, _ = both(2, training=training)
    weight, bias = (tensor.detach().clone() for tensor in one.parameters())
    weight[2] = 1.3  # where a rate is zero, all numbers of a window are equal: a kink
    weight, bias = weight.requires_grad_(), bias.requires_grad_()

    def operation(x, weight, bias):
        return functional_call(one, {"weight": weight, "bias": bias}, (x,))

    x = normal(2, CHANNELS, 5, 2, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(operation, (x, weight, bias))
    assert torch.autograd.gradgradcheck(operation, (x, weight, bias))


@pytest.mark.parametrize("window", [1, 2])
def test_equal_numbers_share_the_gradient_as_in_torch(window):
    one, three = both(window)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(3, (ITEMS, CHANNELS, 6, 4), generator=generator).double()
    for found, expected in zip(derivatives(one, x), derivatives(three, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2])
def test_running_statistics(window):
    one, three = both(window, momentum=0.3)
    for seed in range(3):
        x = 2 + normal(ITEMS, CHANNELS, 5, 7, seed=seed)
        one(x)
        three(x)
    for found, expected in zip(one.buffers(), three.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert one.num_batches_tracked == 3


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_tasks_side_by_side(running, order):
    """Forks of several tasks against a loop over them: losses, meta-gradient and statistics."""
    one, _ = both(2, track_running_stats=running)
    net = nn.Sequential(nn.Conv2d(2, CHANNELS, 3), one, nn.Flatten(), nn.Linear(12, 2)).double()
    targets = normal(TASKS, ITEMS, 2, seed=9)
    batches = [(normal(TASKS, ITEMS, 2, 6, 7, seed=seed), targets) for seed in (5, 6)]

    def loss(model, batch):
        return functional.mse_loss(model(batch[0]), batch[1])

    def learn(tasks, batches):
        return fork(net, tasks=tasks).unroll(
            GradientDescent(0.3), batches, loss, order=order, update_last=False
        )

    together = learn(TASKS, batches)
    found = torch.autograd.grad(together.meta_loss, list(net.parameters()))
    alone = [learn(None, [(x[i], y[i]) for x, y in batches]) for i in range(TASKS)]
    total = torch.stack([done.meta_loss for done in alone]).sum()
    for one, two in zip(found, torch.autograd.grad(total, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    for name, buffer in together.fork.buffers.items():
        expected = torch.stack([done.fork.buffers[name] for done in alone])
        torch.testing.assert_close(buffer, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("memory", ["channels last", "every other item", "transposed"])
def test_maps_that_lie_otherwise_in_memory(memory):
    one, three = both(2)
    x = normal(2 * ITEMS, CHANNELS, 5, 6)
    x = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "every other item": x[::2],
        "transposed": x.mT,
    }[memory]
    assert not x.is_contiguous()
    torch.testing.assert_close(one(x), three(x), rtol=1e-12, atol=1e-13)


def test_the_number_of_threads_changes_no_bit():
    one, _ = both(2)
    x = normal(ITEMS, CHANNELS, 6, 8)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(derivatives(one, x))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float32_is_as_exact_as_torch():
    """Errors against float64, of many numbers far from zero, where a naive variance cancels."""
    one, three = both(2, torch.float32)
    exact, _ = both(2)
    x = (30 + normal(40, CHANNELS, 18, 22)).float()
    expected = derivatives(exact, x.double())
    for found, torchs, right in zip(
        derivatives(one, x), derivatives(three, x), expected, strict=True
    ):
        assert found.dtype == torch.float32
        own, other = ((each - right).norm() / right.norm() for each in (found, torchs))
        assert own <= max(2 * other, 1e-6)


def test_what_is_no_number_stays_none():
    one, _ = both(2)
    x = normal(ITEMS, CHANNELS, 4, 4)
    x[1, 0, 2, 3] = torch.nan
    y = one(x)
    assert y[:, 0].isnan().all()
    assert y[:, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"affine": False}, torch.float64),
        ({"momentum": None}, torch.float64),
        ({}, torch.bfloat16),
    ],
)
def test_what_is_left_to_torch(options, dtype):
    one, three = both(2, dtype, **options)
    x = normal(ITEMS, CHANNELS, 5, 6, dtype=dtype).requires_grad_()
    assert not is_one_operation(one, x)
    assert torch.equal(one(x), three(x))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, CHANNELS, 1, 1), "Expected more than 1 value per channel"),
        ((ITEMS, CHANNELS, 1, 5), "Output size is too small"),
        ((ITEMS, CHANNELS, 5), "expected 4D input"),
    ],
)
def test_shapes_that_torch_refuses(shape, message):
    one, _ = both(2)
    with pytest.raises((ValueError, RuntimeError), match=message):
        one(normal(*shape))


def test_refused_window():
    with pytest.raises(ValueError, match="no maxima over such windows; expected a window of 1 or"):
        NormReluPool(3, 4)


def test_nothing_is_left_behind():
    """No cycle keeps a graph alive once its last tensor has gone."""
    one, _ = both(2)
    gc.collect()
    gc.disable()
    try:
        x = normal(ITEMS, CHANNELS, 4, 6).requires_grad_()
        y = one(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        alive = [weakref.ref(y.grad_fn), weakref.ref(gradient.grad_fn)]
        del y, gradient
        assert [each() for each in alive] == [None, None]
    finally:
        gc.enable()
