import pytest
import torch
from torch.nn import functional

from metalm.fewshot.methods.networks import Classifier, Conv4, FullyConnected, SineNetwork

PICTURES = torch.rand(6, 2, 32, 32, generator=torch.Generator().manual_seed(0))


def normalised(maps):
    dims = [0, *range(2, maps.dim())]
    mean = maps.mean(dims, keepdim=True)
    return (maps - mean) / (maps.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("pooling", "depth", "halvings", "late_width", "num_features"),
    [
        ("max", 4, 4, None, 3 * 2 * 2),
        ("stride", 4, 4, None, 3),
        ("max", 4, 3, 5, 5 * 4 * 4),
        ("stride", 4, 2, 5, 5),
        ("max", 6, 2, 5, 5 * 8 * 8),
        ("max", 1, 1, 5, 3 * 16 * 16),
    ],
)
def test_conv4_step_by_step(pooling, depth, halvings, late_width, num_features):
    network = Conv4(
        channels=2,
        size=32,
        width=3,
        late_width=late_width,
        pooling=pooling,
        halvings=halvings,
        depth=depth,
        statistics="transductive",
    )
    maps = PICTURES
    convolutions = [layer for layer in network.layers if isinstance(layer, torch.nn.Conv2d)]
    late = late_width or 3
    assert [layer.out_channels for layer in convolutions] == [3, 3, *[late] * 4][:depth]
    for number, layer in enumerate(convolutions):
        stride = 2 if pooling == "stride" and number < halvings else 1
        maps = functional.conv2d(maps, layer.weight, layer.bias, stride=stride, padding=1)
        maps = normalised(maps).clamp_min(0)
        if pooling == "max" and number < halvings:
            maps = maps.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    expected = maps.flatten(1) if pooling == "max" else maps.flatten(2).mean(2)
    assert network.num_features == num_features == expected.shape[1]
    torch.testing.assert_close(network(PICTURES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "size"), [("max", 28), ("max", 84), ("stride", 28), ("stride", 35)]
)
def test_the_features_are_as_many_as_announced(pooling, size):
    network = Conv4(size=size, width=5, pooling=pooling, statistics="running")
    pictures = torch.rand(2, 1, size, size)
    assert network(pictures).shape == (2, network.num_features)
    assert network.maps(pictures)[0].numel() == network.num_in_maps


def test_conv4_has_the_published_number_of_parameters():
    # 3 x 3 x 1 x 64 + 64, then three times 3 x 3 x 64 x 64 + 64; two numbers a map normalise.
    expected = 9 * 64 + 64 + 3 * (9 * 64 * 64 + 64) + 4 * 2 * 64
    network = Conv4(statistics="running")
    assert sum(each.numel() for each in network.parameters()) == expected == 111_936


@pytest.mark.parametrize("make", [Conv4, FullyConnected])
def test_whose_statistics(make):
    pictures = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    networks = {}
    for statistics in ("transductive", "running"):
        torch.manual_seed(0)
        networks[statistics] = make(statistics=statistics).eval()
    # Transductive: the neighbours count, in evaluation too. Running: they do not.
    alone = {name: network(pictures[:2]) for name, network in networks.items()}
    among = {name: network(pictures)[:2] for name, network in networks.items()}
    assert not torch.allclose(alone["transductive"], among["transductive"], atol=1e-3)
    torch.testing.assert_close(alone["running"], among["running"])
    assert networks["running"].statistics == "running"
    # While training, both look at what is fed.
    fed = [network.train()(pictures) for network in networks.values()]
    torch.testing.assert_close(fed[0], fed[1])


def test_the_fully_connected_network_step_by_step():
    network = FullyConnected(inputs=12, widths=(5, 4), statistics="transductive")
    pictures = torch.rand(7, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    rows = pictures.flatten(1)
    for layer in network.layers:
        if isinstance(layer, torch.nn.Linear):
            rows = normalised(rows @ layer.weight.T + layer.bias).clamp_min(0)
    torch.testing.assert_close(network(pictures), rows, rtol=1e-4, atol=1e-5)


def test_a_classifier_is_its_body_and_its_head():
    network = Classifier(FullyConnected(inputs=12, widths=(5,), statistics="running"), 3).eval()
    pictures = torch.rand(7, 3, 2, 2)
    expected = network.body(pictures) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(pictures), expected)
    assert network.statistics == "running"
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"body", "head"}


def test_the_sine_network_by_hand():
    network = SineNetwork((4, 3))
    points = torch.linspace(-5, 5, 6).view(2, 3, 1)
    first, second = network.body[0], network.body[2]
    hidden = (points @ first.weight.T + first.bias).clamp_min(0)
    hidden = (hidden @ second.weight.T + second.bias).clamp_min(0)
    torch.testing.assert_close(network(points), hidden @ network.head.weight.T + network.head.bias)
    assert sum(each.numel() for each in SineNetwork().parameters()) == 80 + 40 * 41 + 41


def test_the_published_start_of_the_sine_network():
    torch.manual_seed(0)
    network = SineNetwork((200, 200), start="truncated")
    weights = network.body[2].weight.detach()
    assert float(weights.abs().max()) <= 0.02
    # A normal distribution cut at two deviations has 0.88 of its deviation.
    assert float(weights.std()) == pytest.approx(0.01 * 0.8796, rel=0.02)
    assert not any(each.any() for name, each in network.named_parameters() if "bias" in name)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="expected transductive or running, found 'batch'"):
        Conv4(statistics="batch")
    with pytest.raises(ValueError, match="expected at least 16 pixels, found 15"):
        Conv4(size=15, statistics="running")
    with pytest.raises(ValueError, match="expected at least 8 pixels, found 7"):
        Conv4(size=7, halvings=3, statistics="running")
    with pytest.raises(ValueError, match="expected 0 to 4, one a layer at most, found 5"):
        Conv4(halvings=5, statistics="running")
    with pytest.raises(ValueError, match="expected at least 1 layer, found 0"):
        Conv4(depth=0, halvings=0, statistics="running")
