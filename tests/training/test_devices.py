import pytest
import torch

from metalm.training.devices import refuse_missing_device


def test_the_processor_is_always_there():
    refuse_missing_device("cpu")


@pytest.mark.parametrize("name", ["warp", "cpu:x", "cuda:4096"])
def test_what_torch_does_not_find_is_refused(name):
    with pytest.raises(ValueError, match=rf"cannot use the device '{name}'; .*; choose another"):
        refuse_missing_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="cannot use the device 'cuda'; expected one that torch"):
        refuse_missing_device("cuda")
