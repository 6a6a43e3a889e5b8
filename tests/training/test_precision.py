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


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_quick_float32_is_as_exact_as_float32():
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(3, *s, generator=generator) for s in ((10, 70), (70, 90)))
    before = setting()
    with precision.quickest_float32(left):
        found = left @ right
    assert setting() == before
    exact = left.double() @ right.double()
    assert (found - exact).norm() < 2e-6 * exact.norm()


def test_quick_float32_is_asked_for_where_it_is_exact_and_pays(monkeypatch):
    before = setting()
    monkeypatch.setattr(precision, "_onednn_is_exact", lambda: True)

    @precision.quickest_float32(torch.ones(2, 3, 4))
    def fail():
        assert setting() == "bf16"
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert setting() == before
    for other in (torch.ones(1, 3, 4), torch.ones(2, 3, 4, dtype=torch.float64)):
        with precision.quickest_float32(other):
            assert setting() == before
    monkeypatch.setattr(precision, "_onednn_is_exact", lambda: False)
    with precision.quickest_float32(torch.ones(2, 3, 4)):
        assert setting() == before


def test_a_library_that_rounds_is_found_out(monkeypatch):
    product = torch.Tensor.__matmul__

    def rounding(left, right):
        if setting() == "bf16":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not precision._onednn_is_exact.__wrapped__()
