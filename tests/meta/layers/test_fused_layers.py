"""Fused modules: the same tensors under the same names, the same answers, and what stays."""

import copy

import pytest
import torch
from torch import nn

from metalm.meta.layers.fused_layers import fused
from metalm.meta.layers.norm_relu_pool import NormReluPool


def block(before, after, *more, **norm):
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, **norm), nn.ReLU(), *more]


class Residual(nn.Module):
    """A module with a forward of its own, around sequences."""

    def __init__(self):
        super().__init__()
        self.into = nn.Sequential(*block(2, 3, nn.MaxPool2d(2)))
        self.again = nn.Sequential(*block(3, 3, track_running_stats=False), nn.Dropout(0.0))
        self.also = self.again  # used twice

    def forward(self, x):
        x = self.into(x)
        return self.also(x + self.again(x))


def pictures(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 9, 8, generator=generator, dtype=torch.float64).to(dtype)


def kinds(module):
    return [type(part).__name__ for part in module.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_the_same_answers_gradients_and_statistics(training):
    torch.manual_seed(0)
    plain = nn.Sequential(Residual(), nn.Flatten(), nn.Linear(48, 2)).double().train(training)
    twin = copy.deepcopy(plain)
    quick = fused(twin)
    assert kinds(quick).count("NormReluPool") == 2
    for _ in range(2):
        torch.testing.assert_close(quick(pictures()), plain(pictures()), rtol=1e-11, atol=1e-13)
    wanted = torch.autograd.grad(plain(pictures()).square().sum(), list(plain.parameters()))
    found = torch.autograd.grad(quick(pictures()).square().sum(), list(twin.parameters()))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    for one, two in zip(twin.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_tensors_are_shared_and_keep_their_names():
    module = Residual()
    quick = fused(module)
    for kind in ("named_parameters", "named_buffers"):
        own, other = (dict(getattr(each, kind)()) for each in (module, quick))
        assert list(own) == list(other)
        assert all(own[name] is other[name] for name in own)
    assert list(quick.state_dict()) == list(module.state_dict())
    assert quick.again is quick.also


def test_the_module_itself_stays_as_it_is():
    module = Residual()
    before = kinds(module)
    quick = fused(module)
    assert kinds(module) == before
    quick.eval()
    assert module.into[1].training
    assert not quick.into[1].training


def pool(**options):
    return nn.Sequential(*block(2, 3, nn.MaxPool2d(**options)))


@pytest.mark.parametrize(
    ("make", "window"),
    [
        (lambda: nn.Sequential(*block(2, 3)), 1),
        (lambda: nn.Sequential(*block(2, 3, nn.AvgPool2d(2))), 1),
        (lambda: pool(kernel_size=2), 2),
        (lambda: pool(kernel_size=(2, 2), stride=2), 2),
        (lambda: pool(kernel_size=3), 1),
        (lambda: pool(kernel_size=2, stride=1), 1),
        (lambda: pool(kernel_size=2, padding=1), 1),
        (lambda: pool(kernel_size=2, ceil_mode=True), 1),
    ],
)
def test_which_maxima_are_part_of_it(make, window):
    module = make().double()
    quick = fused(module)
    assert quick[1].window == window
    assert isinstance(quick[3], nn.Identity) == (window == 2) if len(quick) > 3 else True
    torch.testing.assert_close(quick(pictures()), module(pictures()), rtol=1e-11, atol=1e-13)


class OwnNorm(nn.BatchNorm2d):
    pass


class Backwards(nn.Sequential):
    def forward(self, x):
        for part in reversed(list(self)):
            x = part(x)
        return x


def listened():
    module = nn.Sequential(*block(2, 3))
    module[2].register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), OwnNorm(3), nn.ReLU()),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), nn.ReLU()),
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.ReLU()),
        lambda: Backwards(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        lambda: nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU()]),
        lambda: nn.Sequential(nn.BatchNorm2d(3)),
        listened,
    ],
)
def test_what_stays_as_it_is(make):
    module = make()
    assert fused(module) is module


def test_a_fused_module_is_fused_already():
    quick = fused(nn.Sequential(*block(2, 3)))
    assert fused(quick) is quick
    assert isinstance(quick[1], NormReluPool)
