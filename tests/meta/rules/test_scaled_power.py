import pytest
import torch

from metalm.meta.rules.scaled_power import scaled_power


@pytest.mark.parametrize("own", [(), (4, 1), (4, 3)])
def test_value_and_derivatives_by_finite_differences(own):
    generator = torch.Generator().manual_seed(1)
    base = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    factor = torch.rand(own, generator=generator, dtype=torch.float64)
    eps, exponent = (torch.tensor(x, dtype=torch.float64) for x in (0.2, 0.7))
    found = scaled_power(base, eps, exponent, factor)
    for i in range(4):
        for j in range(3):
            c = factor.expand(4, 3)[i, j].item()
            assert found[i, j].item() == pytest.approx(
                c * (base[i, j].item() + 0.2) ** -0.7, rel=1e-12
            )
    inputs = [x.requires_grad_() for x in (eps, exponent, factor)]
    assert torch.autograd.gradcheck(lambda *numbers: scaled_power(base, *numbers), inputs)
