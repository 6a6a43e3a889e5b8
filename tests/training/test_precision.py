import pytest
import torch

from metalm.training import precision


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_only_where_it_is_wanted_and_pays(wanted, has, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: has)
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    with precision.reduced_products("cpu", wanted):
        found = (left @ right).dtype
    assert found == (torch.bfloat16 if wanted and has else torch.float32)


def test_other_devices_have_none():
    assert not precision.has_bfloat16("mps")
    assert isinstance(precision.has_bfloat16("cpu"), bool)
