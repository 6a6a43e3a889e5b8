"""Where Triton does not run, torch's own operations take its place."""

import logging
import sys
from types import ModuleType

import pytest
import torch

from metalm.meta.kernels import gpu_support

KERNELS = "metalm.meta.kernels.gpu_kernels"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is known before and after; the probe's tensor lives on the processor."""
    ones = torch.ones
    monkeypatch.setattr(gpu_support.torch, "ones", lambda count, device: ones(count))
    for function in (gpu_support.kernels_in, gpu_support._triton_works):
        function.cache_clear()
    yield
    for function in (gpu_support.kernels_in, gpu_support._triton_works):
        function.cache_clear()


def standing_in(monkeypatch, write_step):
    module = ModuleType(KERNELS)
    module.write_step = write_step
    monkeypatch.setitem(sys.modules, KERNELS, module)
    return module


def test_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, KERNELS, None)  # an import of it fails
    assert gpu_support.kernels_in(KERNELS) is None


def test_kernels_that_work(monkeypatch):
    calls = []

    def step(new, weight, gradient, slow, rate, decay):
        calls.append(new)
        new -= rate * gradient

    module = standing_in(monkeypatch, step)
    assert gpu_support.kernels_in(KERNELS) is module
    assert gpu_support.kernels_in(KERNELS) is module
    assert len(calls) == 1  # probed once


def test_no_compiler(monkeypatch, caplog):
    def step(*arguments):
        raise RuntimeError("Failed to find C compiler")

    standing_in(monkeypatch, step)
    with caplog.at_level(logging.WARNING):
        assert gpu_support.kernels_in(KERNELS) is None
    assert "Failed to find C compiler" in caplog.text


def test_kernels_that_do_nothing(monkeypatch):
    standing_in(monkeypatch, lambda *arguments: None)
    assert gpu_support.kernels_in(KERNELS) is None


def test_memory_that_is_full_is_said(monkeypatch):
    def step(*arguments):
        raise torch.OutOfMemoryError("full")

    standing_in(monkeypatch, step)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        gpu_support.kernels_in(KERNELS)
