"""How a token's surprise weighs what is learnt from it: closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from metalm.adapt import AdaptiveReader, count_gradients, krause_rule, learn_rule
from metalm.adapt.token_losses import by_surprise, says_something, token_nats
from metalm.meta.rules import GradientDescent

SEGMENT = 4


def test_tokens_that_cannot_come():
    """Those of minus infinity: the softmax is that of the others."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2, 4]] * 3)
    expected = token_nats(logits[..., [0, 1, 2, 4]], targets.clamp(max=3))
    masked = logits.index_fill(-1, torch.tensor([3, 5]), -math.inf)
    torch.testing.assert_close(token_nats(masked, targets), expected, rtol=1e-14, atol=0)
    assert token_nats(masked, torch.full((3, 4), 5)).isposinf().all()


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf] * 6, [math.inf, -math.inf]])
def test_where_nothing_is_said_the_uniform_distribution_speaks(bad):
    logits = torch.zeros(2, 6)
    logits[1, : len(bad)] = torch.tensor(bad)
    assert says_something(logits).tolist() == [True, False]
    assert token_nats(logits, torch.tensor([3, 3])).tolist() == pytest.approx([math.log(6)] * 2)


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0, 2.0])
def test_the_weight_is_a_constant(power):
    """The gradient to a token's nats is (nats / 3)^power itself, and not (1 + power) times it."""
    nats = torch.tensor([[0.0, 0.5], [3.0, 11.0]], dtype=torch.float64, requires_grad=True)
    found = by_surprise(nats, power)
    (gradient,) = torch.autograd.grad(found.sum(), nats)
    for place in ((0, 1), (1, 0), (1, 1)):
        weight = math.exp(power * math.log(nats[place].item() / 3))
        assert gradient[place].item() == pytest.approx(weight, rel=1e-14)
        assert found[place].item() == pytest.approx(weight * nats[place].item(), rel=1e-14)
    assert gradient[0, 0] == (power == 0)
    assert (found is nats) == (power == 0)


def weighed_read(model, tokens, power):
    """One text, read by gradients of weighed losses; the model's own forward, its own loop."""
    slow = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights, state, found = dict(slow), None, []
    sequence = torch.tensor([2, *tokens])
    for start in range(0, len(tokens), SEGMENT):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        inputs = sequence[start : start + SEGMENT][: len(tokens) - start]
        targets = sequence[start + 1 : start + 1 + SEGMENT]
        tied = {**leaves, "output.weight": leaves["embedding.weight"]}
        logits, state = torch.func.functional_call(model, tied, (inputs[None], state))
        total = 0.0
        for said, target in zip(logits[0].log_softmax(-1), targets, strict=True):
            cost = -said[target]
            found.append(cost.item())
            total = total + cost * (found[-1] / 3) ** power
        gradients = torch.autograd.grad(total / SEGMENT, list(leaves.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            weights[name] = weight - 0.7 * gradient + 0.05 * (slow[name] - weight)
        state = {"hidden": state["hidden"].detach()}
    return np.array(found)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("power", [0.25, 1.5])
def test_texts_are_read_as_a_plain_loop_reads_them(recurrent, texts, power, together):
    reader = AdaptiveReader(
        recurrent, GradientDescent(0.7, 0.05), segment=SEGMENT, start_token=2, surprise=power
    )
    for text, reading in zip(texts, reader.read_texts(texts, together=together), strict=True):
        np.testing.assert_allclose(reading.nats, weighed_read(recurrent, text, power), rtol=1e-10)
    other = AdaptiveReader(recurrent, reader.rule, segment=SEGMENT, start_token=2)
    assert abs(other.read(texts[0]).nats - reader.read(texts[0]).nats).max() > 1e-3
    assert reader.with_rule(None).surprise == power


def test_a_rule_is_learned_by_a_reader_that_weighs(recurrent, texts):
    plain = AdaptiveReader(recurrent, segment=SEGMENT, start_token=2)
    rms = count_gradients(plain, texts)
    means = []
    for power in (0.0, 0.5):
        reader = AdaptiveReader(
            recurrent, krause_rule(rms, rate=0.05), segment=SEGMENT, start_token=2, surprise=power
        )
        means.append(learn_rule(reader, texts[:1], steps=2, unrolled=2))
    # Before anything is learnt the losses are those of the first segment alone.
    static = plain.read(texts[0]).nats
    first = reader.read(texts[0]).nats[:SEGMENT]
    np.testing.assert_allclose(first, static[:SEGMENT], rtol=1e-12)
    assert means[0] != means[1]
    assert all(math.isfinite(mean) for of_power in means for mean in of_power)


@pytest.mark.parametrize("power", [-0.1, math.inf, math.nan])
def test_impossible_powers_are_refused(recurrent, power):
    with pytest.raises(ValueError, match=f"a finite number from 0, found {power}"):
        AdaptiveReader(recurrent, surprise=power)
