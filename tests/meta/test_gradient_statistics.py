"""RMS of gradients against the formula written out by hand."""

import math

import pytest
import torch

from metalm.meta.gradient_statistics import GradientStatistics


def test_rms_by_hand():
    gradients = [
        {"w": torch.tensor([[3.0, 0.0]]), "b": torch.tensor(2.0)},
        {"w": torch.tensor([[1.0, -2.0]]), "b": torch.tensor(-4.0)},
        {"w": torch.tensor([[-5.0, 0.0]]), "b": torch.tensor(0.0)},
    ]
    rms = GradientStatistics(iter(gradients)).rms()
    expected = [[math.sqrt(35 / 3), math.sqrt(4 / 3)]]
    torch.testing.assert_close(rms["w"], torch.tensor(expected))
    torch.testing.assert_close(rms["b"], torch.tensor(math.sqrt(20 / 3)))
    assert torch.equal(gradients[0]["w"], torch.tensor([[3.0, 0.0]]))


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        GradientStatistics([]).rms()


def test_other_names_are_an_error():
    statistics = GradientStatistics([{"w": torch.ones(2)}])
    with pytest.raises(ValueError, match="other parameters"):
        statistics.add({"v": torch.ones(2)})
