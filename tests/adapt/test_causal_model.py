"""A causal model of `transformers`, tiny and random, read through the adapter."""

import numpy as np
import pytest
import torch

from metalm.adapt import AdaptiveReader, CausalModel
from metalm.meta.rules import GradientDescent

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(6)
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=12,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    return transformers.GPT2LMHeadModel(config).double()


def test_without_learning_every_token_sees_its_window(gpt2, texts):
    """Token by token with the model alone: the window before the segment, then the segment."""
    tokens = [2, *texts[0]]
    nats, _ = AdaptiveReader(CausalModel(gpt2, context=6), segment=4, start_token=2).read(texts[0])
    gpt2.eval()
    for place in range(1, len(tokens)):
        segment_start = (place - 1) // 4 * 4
        begin = max(0, segment_start - 6)
        with torch.no_grad():
            logits = gpt2(torch.tensor([tokens[begin:place]])).logits[0, -1]
        expected = -logits.log_softmax(-1)[tokens[place]]
        assert nats[place - 1] == pytest.approx(expected.item(), rel=1e-9)


def test_reading_equals_plain_dynamic_evaluation(gpt2, texts):
    """The model's own labels, backward pass and SGD step, for a text that fits into one window."""
    tokens = torch.tensor([[2, *texts[2][:8]]])
    reader = AdaptiveReader(
        CausalModel(gpt2, context=8), GradientDescent(0.3), segment=4, start_token=2
    )
    nats, state = reader.read(texts[2][:8])
    twin = transformers.GPT2LMHeadModel(gpt2.config).double().eval()
    twin.load_state_dict(gpt2.state_dict())
    expected = []
    for start in (0, 4):
        logits = twin(tokens[:, : start + 4]).logits[0, start:]
        costs = torch.nn.functional.cross_entropy(
            logits, tokens[0, start + 1 : start + 5], reduction="none"
        )
        expected += costs.tolist()
        twin.zero_grad()
        costs.mean().backward()
        with torch.no_grad():
            for weight in twin.parameters():
                weight -= 0.3 * weight.grad
    np.testing.assert_allclose(nats, expected, rtol=1e-8)
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(state.fast[f"model.{name}"], weight.detach())


def test_the_future_changes_no_bit_of_the_past_and_a_state_comes_back(gpt2, texts, tmp_path):
    reader = AdaptiveReader(CausalModel(gpt2), GradientDescent(0.3), ["*.mlp.*"], segment=4)
    whole, _ = reader.read(texts[0])
    changed = texts[0].copy()
    changed[10:] = (changed[10:] + 4) % 11
    np.testing.assert_array_equal(reader.read(changed).nats[:10], whole[:10])
    first, state = reader.read(texts[0][:9])  # the first token is not scored: two segments
    reader.save(state, tmp_path / "state.safetensors")
    second, _ = reader.read(texts[0][9:], reader.load(tmp_path / "state.safetensors"))
    np.testing.assert_array_equal(np.concatenate((first, second)), whole)
    assert state.model_state.tolist() == [texts[0][2:8].tolist()]


def test_windows_that_do_not_fit(gpt2, texts):
    assert CausalModel(gpt2).context == 6
    for context in (-1, 12):
        with pytest.raises(ValueError, match=f"from 0 to below 12, .*found {context}"):
            CausalModel(gpt2, context=context)
    reader = AdaptiveReader(CausalModel(gpt2, context=10), segment=4)
    with pytest.raises(ValueError, match="at most 2 tokens beside a context of 10, found 4"):
        reader.read(texts[0])
