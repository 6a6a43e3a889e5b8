"""A first layer in one operation against torch's modules, and against finite differences."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from metalm.meta.layers import first_layer as module_under_test
from metalm.meta.layers.first_layer import first_layer, is_first
from metalm.meta.layers.fused_layers import FusedSequential, fused
from metalm.meta.module_fork import fork
from metalm.meta.rules import GradientDescent

KINDS = {
    "plain": {"padding": 1},
    "no bias": {"padding": 1, "bias": False},
    "strided": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layers(kind="plain", channels=37, maxima=True, training=True, **norm):
    """Torch's own modules; 37 channels are two blocks and a part of one."""
    torch.manual_seed(5)
    made = nn.Sequential(
        nn.Conv2d(2, channels, 3, **KINDS[kind]),
        nn.BatchNorm2d(channels, **norm),
        nn.ReLU(),
        *([nn.MaxPool2d(2)] if maxima else []),
    ).double()
    with torch.no_grad():
        made[1].weight.copy_(normal(channels, seed=7))
        made[1].bias.copy_(0.3 * normal(channels, seed=8))
    return made.train(training)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module_under_test, "_BLOCK", 1)


def is_one_operation(module, pictures):
    return module(pictures).grad_fn.name().startswith("_FirstLayer")


def derivatives(module, pictures):
    """Output; gradients of a weighted sum of it; and those of a weighted sum of these."""
    y = module(pictures)
    pushed = normal(*y.shape, seed=1).requires_grad_()
    leaves = list(module.parameters())
    first = torch.autograd.grad((y * pushed).sum(), leaves, create_graph=True)
    along = [normal(*g.shape, seed=seed) for seed, g in enumerate(first, 2)]
    total = sum((g * a).sum() for g, a in zip(first, along, strict=True))
    second = torch.autograd.grad(
        total, [*leaves, pushed], allow_unused=True, materialize_grads=True
    )
    return [y.detach(), *(g.detach() for g in first), *second]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maxima", [True, False])
@pytest.mark.parametrize(("running", "training"), [(False, True), (True, True), (True, False)])
def test_numbers_and_both_derivatives(kind, maxima, running, training):
    plain = layers(kind, maxima=maxima, training=training, track_running_stats=running, eps=0.03)
    quick, pictures = fused(copy.deepcopy(plain)), normal(4, 2, 9, 8, seed=3)
    names = [name for name, _ in plain.named_parameters()]
    found, expected = derivatives(quick, pictures), derivatives(plain, pictures)
    for number, (one, two) in enumerate(zip(found, expected, strict=True)):
        what = f"{number} of {1 + 2 * len(names) + 1}"
        torch.testing.assert_close(
            one, two, rtol=1e-9, atol=1e-10, msg=lambda m, w=what: f"{w}: {m}"
        )
    for one, two in zip(quick.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    assert is_one_operation(quick, pictures)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivative_by_finite_differences(training):
    quick = fused(layers(channels=3, training=training))
    names = [name for name, _ in quick.named_parameters()]

    def operation(*numbers):
        return functional_call(quick, dict(zip(names, numbers, strict=True)), (pictures,))

    pictures = normal(2, 2, 5, 4, seed=4)
    numbers = tuple(tensor.detach().clone().requires_grad_() for tensor in quick.parameters())
    assert is_one_operation(quick, pictures)
    assert torch.autograd.gradcheck(operation, numbers)
    assert torch.autograd.gradgradcheck(operation, numbers)


@pytest.mark.parametrize("tasks", [None, 3])
def test_learning_one_task_or_several(tasks):
    """Meta-gradients at order 2; side by side it is two operations."""
    plain = nn.Sequential(*layers(channels=5), nn.Flatten(), nn.Linear(80, 2)).double()
    quick = fused(plain)
    lead = (3,) if tasks is None else (3, tasks)
    pictures, targets = normal(*lead, 4, 2, 8, 8, seed=2), normal(*lead, 4, 2, seed=3)

    def loss(model, batch):
        return functional.mse_loss(model(batch[0]), batch[1])

    found = []
    for module in (plain, quick):
        done = fork(module, tasks=tasks).unroll(
            GradientDescent(0.1), list(zip(pictures, targets, strict=True)), loss, order=2
        )
        found.append(torch.autograd.grad(done.meta_loss.sum(), list(plain.parameters())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_the_way_back_may_lie_in_autocast():
    quick, plain = (made(layers(channels=5)) for made in (fused, lambda module: module))
    pictures, found = normal(4, 2, 9, 8), []
    for module in (quick, plain):
        total = module(pictures).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(total, list(module.parameters())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_maps_between_are_not_kept():
    quick, plain = fused(layers(channels=64)), layers(channels=64)
    pictures = normal(6, 2, 16, 16)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first = torch.autograd.grad(
            quick(pictures).sum(), list(quick.parameters()), create_graph=True
        )
        assert max(sizes) == 6 * 64 * 8 * 8
        plain(pictures)
    assert max(sizes) == 6 * 64 * 16 * 16
    assert all(gradient.requires_grad for gradient in first)


def test_what_goes_the_way_of_two_modules():
    quick, plain = fused(layers(channels=5)), layers(channels=5)
    for pictures in (
        normal(4, 2, 9, 8).requires_grad_(),  # a gradient is asked for
        normal(2, 9, 8),  # a single picture
    ):
        if pictures.dim() == 4:
            torch.testing.assert_close(quick(pictures), plain(pictures), rtol=1e-11, atol=1e-13)
            assert not is_one_operation(quick, pictures)
        else:
            with pytest.raises(ValueError, match="expected 4D"):
                quick(pictures)
    for wrong, message in ((normal(4, 3, 9, 8), "channels"), (normal(4, 2, 9, 8).float(), "type")):
        with pytest.raises(RuntimeError, match=message):
            quick(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one_operation(quick, normal(4, 2, 9, 8))
    heard = []
    quick[0].register_forward_hook(lambda *_: heard.append(1))
    assert not is_one_operation(quick, normal(4, 2, 9, 8))
    assert heard


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(5, 6, 3),
        nn.Conv2d(2, 6, 3, groups=2),
        nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 6, 3, padding="same"),
    ],
)
def test_which_convolutions_stay_as_they_are(convolution):
    made = fused(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.ReLU()))
    assert not is_first(made[0], made[1])
    assert type(made) is nn.Sequential


def test_a_norm_of_other_width_is_refused_by_torch():
    made = fused(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(5), nn.ReLU()))
    with pytest.raises(RuntimeError, match="should contain 6 elements not 5"):
        made(torch.randn(2, 2, 6, 6))


def test_a_joined_sequence_is_one_like_any_other():
    made = fused(layers(channels=5))
    assert isinstance(made, FusedSequential)
    twin = copy.deepcopy(made)
    pictures = normal(4, 2, 9, 8)
    torch.testing.assert_close(twin(pictures), made(pictures))
    torch.testing.assert_close(made[:2](pictures), first_layer(pictures, made[0], made[1]))
    assert [type(part).__name__ for part in made] == [
        "Conv2d",
        "NormReluPool",
        "Identity",
        "Identity",
    ]
    assert fused(made) is made


def test_gradients_by_torch_func():
    """Of the parameters, and of the pictures, which its transforms ask for in their own way."""
    plain = layers(channels=5, track_running_stats=False)
    quick, pictures = fused(plain), normal(3, 4, 2, 9, 8)
    numbers = {name: tensor.detach() for name, tensor in plain.named_parameters()}

    def total(module):
        return lambda values, x: functional_call(module, values, (x,)).square().sum()

    for which in (0, 1):
        one, two = (torch.func.grad(total(m), which)(numbers, pictures[0]) for m in (quick, plain))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    one, two = (
        torch.func.vmap(torch.func.grad(total(m), 1), (None, 0))(numbers, pictures)
        for m in (quick, plain)
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
