import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from metalm.fewshot.methods.snail import AttentionBlock, DenseBlock, Snail, causal_layers

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def layer(kind):
    torch.manual_seed(0)
    made = {
        "attention": lambda: AttentionBlock(5, 4, 3),
        "convolution 1": lambda: DenseBlock(5, 3, 1),
        "convolution 4": lambda: DenseBlock(5, 3, 4),
        "convolution 16": lambda: DenseBlock(5, 3, 16),
    }
    return made[kind]().double()


KINDS = ["attention", "convolution 1", "convolution 4", "convolution 16"]


@pytest.mark.parametrize("kind", KINDS)
def test_later_inputs_cannot_change_earlier_outputs(kind):
    steps = random(2, 9, 5)
    before = layer(kind)(steps)
    for time in range(9):
        changed = steps.clone()
        changed[:, time] += 1
        difference = (layer(kind)(changed) - before).abs().amax((0, 2))
        assert not difference[:time].any()
        assert difference[time] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_more_step_is_that_of_the_whole_sequence(kind):
    past, last = random(2, 7, 5), random(2, 6, 5)
    found = layer(kind).follow(past, last)
    for query in range(6):
        whole = layer(kind)(torch.cat([past, last[:, query : query + 1]], 1))
        torch.testing.assert_close(found[:, query], whole[:, -1])


def test_attention_by_loops():
    block, steps = layer("attention"), random(2, 6, 5)
    found = block(steps)
    torch.testing.assert_close(found[..., :5], steps)
    queries, keys, values = block.queries(steps), block.keys(steps), block.values(steps)
    for sequence in range(2):
        for time in range(6):
            scores = [
                (queries[sequence, time] @ keys[sequence, s]).item() / math.sqrt(4)
                for s in range(time + 1)
            ]
            total = sum(math.exp(score) for score in scores)
            expected = sum(
                math.exp(score) / total * values[sequence, s] for s, score in enumerate(scores)
            )
            torch.testing.assert_close(found[sequence, time, 5:], expected)


@pytest.mark.parametrize("dilation", [1, 4, 16])
def test_dense_blocks_are_causal_convolutions(dilation):
    block, steps = layer(f"convolution {dilation}"), random(2, 9, 5)
    kernel = torch.stack([block.then.weight, block.now.weight], -1)
    padded = functional.pad(steps.mT, (dilation, 0))
    both = functional.conv1d(padded, kernel, block.now.bias, dilation=dilation).mT
    expected = both[..., :3].tanh() * both[..., 3:].sigmoid()
    torch.testing.assert_close(block(steps), torch.cat([steps, expected], -1))


def test_the_layers_of_the_paper():
    # 5-way, 1 to 5 shots: sequences of at most 26 steps, hence 5 blocks with dilations 2 to 32.
    layers, numbers = causal_layers(64 + 5, 26)
    kinds = [type(each).__name__[0] for each in layers]
    assert "".join(kinds) == "ADDDDDADDDDDA"
    dilations = [each.dilation for each in layers if isinstance(each, DenseBlock)]
    assert dilations == [2, 4, 8, 16, 32] * 2
    assert numbers == 69 + 32 + 5 * 128 + 128 + 5 * 128 + 256
    attention = [each for each in layers if isinstance(each, AttentionBlock)]
    assert [each.keys.out_features for each in attention] == [64, 256, 512]
    assert [each.values.out_features for each in attention] == [32, 128, 256]


@pytest.mark.parametrize("shot", [1, 2])
def test_answers_are_those_of_whole_sequences(shot):
    """The textbook way: one sequence for every query, with zeros for its label."""
    torch.manual_seed(0)
    network = Snail(nn.Identity(), "none", num_features=4, way=3, max_shot=2).double()
    targets = torch.arange(3).repeat_interleave(shot)[torch.randperm(3 * shot)][None].repeat(2, 1)
    support, query = random(2, 3 * shot, 4), random(2, 5, 4)
    found = network.answer(network.remember(support, targets), query)
    for task in range(2):
        for q in range(5):
            features = torch.cat([support[task], query[task, q : q + 1]])
            labels = torch.zeros(3 * shot + 1, 3, dtype=torch.float64)
            for i, target in enumerate(targets[task]):
                labels[i, target] = 1
            steps = torch.cat([features, labels], 1)[None]
            for each in network.layers:
                steps = each(steps)
            torch.testing.assert_close(found[task, q], network.head(steps[0, -1]))


def test_more_classes_than_the_network_has_are_refused():
    network = Snail(nn.Identity(), "none", num_features=4, way=3, max_shot=1)
    with pytest.raises(ValueError, match="expected 3 classes, found target 3"):
        network.remember(torch.rand(1, 4, 4), torch.arange(4)[None])
