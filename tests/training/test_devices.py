from unittest import mock

import pytest
import torch

from metalm.training.devices import use_device


def test_the_processor_is_always_there():
    use_device("cpu")


@pytest.mark.parametrize("name", ["warp", "cpu:x", "cuda:4096"])
def test_what_torch_does_not_find_is_refused(name):
    with pytest.raises(ValueError, match=rf"cannot use the device '{name}'; .*; choose another"):
        use_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="cannot use the device 'cuda'; expected one that torch"):
        use_device("cuda")


def test_the_named_one_of_several_does_the_work(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: mock.Mock(device=torch.device(device)))
    for name in ("cpu", "cuda", "cuda:1"):  # without a number: that of this process
        use_device(name)
    assert chosen == [torch.device("cuda:1")]
