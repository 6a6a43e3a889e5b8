"""Articles in succession: against a plain reading with plain arithmetic between; and causality."""

import numpy as np
import pytest
import torch

from metalm.language.memory.consolidation import (
    ConsolidationConfig,
    LongTermMemory,
    read_in_succession,
)
from metalm.language.reading.reader import Reader
from metalm.training import checkpoint

NAMES = ("decoder.bias", "embedding.weight", "layers.0.input_weight")
SEGMENT = 4
CONFIG = ConsolidationConfig(share=0.6, elasticity=0.8)


@pytest.fixture
def fisher(tiny_model):
    generator = torch.Generator().manual_seed(9)
    own = dict(tiny_model().named_parameters())
    return {
        n: torch.rand(own[n].shape, generator=generator, dtype=torch.float64) ** 4 for n in NAMES
    }


@pytest.fixture
def read(tiny_model, learning, fisher):
    """Reads texts in succession with a fresh memory; gives the losses and the memory."""

    def run(texts, config=CONFIG, kind="learned rates", memory=None):
        model = tiny_model()
        rule, _ = learning(kind, model, NAMES)
        memory = memory or LongTermMemory(model, fisher, config)
        return read_in_succession(model, rule, SEGMENT, texts, memory), memory

    return run


def plain_gradient_descent(model, text, plain_nats, plain_state):
    """One article by gradient descent, token by token: losses and the last fast weights."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    slow, state, nats, inputs = dict(weights), plain_state(model), [], [0, *text[:-1]]
    for start in range(0, len(text), SEGMENT):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        part = slice(start, start + SEGMENT)
        costs, _, state = plain_nats(leaves, inputs[part], text[part], state)
        state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
        nats += costs.tolist()
        gradients = torch.autograd.grad(costs.sum() / SEGMENT, [leaves[name] for name in NAMES])
        for name, gradient in zip(NAMES, gradients, strict=True):
            old = weights[name]
            weights[name] = old - 0.7 * gradient + 0.05 * (slow[name] - old)
    return np.array(nats), weights


def test_it_is_plain_reading_with_plain_arithmetic_between(
    tiny_model, texts, fisher, read, plain_nats, plain_state
):
    found, memory = read(texts, kind="gradient descent")
    model = tiny_model()
    own = dict(model.named_parameters())
    home = {name: own[name].detach().clone() for name in NAMES}
    mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    for text, nats in zip(texts, found, strict=True):
        expected, fast = plain_gradient_descent(model, text, plain_nats, plain_state)
        np.testing.assert_allclose(nats, expected, rtol=1e-9)
        with torch.no_grad():
            for name in NAMES:
                pull = CONFIG.elasticity * fisher[name] / mean
                kept = CONFIG.share * fast[name] + (1 - CONFIG.share) * own[name]
                own[name].copy_((kept + pull * home[name]) / (1 + pull))
    for name in NAMES:
        torch.testing.assert_close(memory.slow[name], own[name].detach(), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(memory.slow[name], home[name], atol=1e-4)
        assert torch.equal(memory.home[name], home[name])
    assert memory.num_articles == len(texts)
    away, size = (
        torch.cat([tensors[name].flatten() for name in NAMES])
        for tensors in ({name: own[name].detach() - home[name] for name in NAMES}, home)
    )
    assert memory.moved() == pytest.approx(float(away.norm() / size.norm()), rel=1e-9)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_nothing_is_consolidated_before_it_is_scored(texts, read, number):
    """Whatever follows a token, in its article or later, changes no bit of the scores before it."""
    found, _ = read(texts)
    place = len(texts[number]) // 2
    future = [text.copy() for text in texts]
    future[number][place:] = (future[number][place:] + 3) % 11
    for later in range(number + 1, len(texts)):
        future[later] = (future[later] + 5) % 11
    changed, _ = read(future)
    for earlier in range(number):
        np.testing.assert_array_equal(changed[earlier], found[earlier])
    np.testing.assert_array_equal(changed[number][:place], found[number][:place])
    assert (changed[number][place:] != found[number][place:]).all()


def test_what_was_read_reaches_the_next_article_and_no_article_its_own_scores(
    tiny_model, learning, texts, read
):
    found, _ = read(texts)
    rule, _ = learning("learned rates", tiny_model(), NAMES)
    reset = Reader(tiny_model(), rule, NAMES, SEGMENT).read(texts)
    np.testing.assert_array_equal(found[0], reset.nats[0])
    for together, alone in zip(found[1:], reset.nats[1:], strict=True):
        assert (together != alone).all()


def test_keeping_nothing_is_the_reset_mode(tiny_model, learning, texts, read):
    found, memory = read(texts, ConsolidationConfig(share=0.0, elasticity=0.0))
    rule, _ = learning("learned rates", tiny_model(), NAMES)
    reset = Reader(tiny_model(), rule, NAMES, SEGMENT).read(texts)
    for together, alone in zip(found, reset.nats, strict=True):
        np.testing.assert_array_equal(together, alone)
    assert all(torch.equal(memory.slow[name], memory.home[name]) for name in NAMES)


def test_an_infinite_penalty_is_the_reset_mode_too(tiny_model, learning, texts, read):
    found, memory = read(texts, ConsolidationConfig(share=1.0, elasticity=float("inf")))
    rule, _ = learning("learned rates", tiny_model(), NAMES)
    reset = Reader(tiny_model(), rule, NAMES, SEGMENT).read(texts)
    for together, alone in zip(found, reset.nats, strict=True):
        np.testing.assert_array_equal(together, alone)
    assert all(torch.equal(memory.slow[name], memory.home[name]) for name in NAMES)


def test_the_model_is_left_as_it_was_and_a_moved_one_reads_otherwise(
    tiny_model, learning, texts, fisher
):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rule, _ = learning("learned rates", model, NAMES)
    memory = LongTermMemory(model, fisher, CONFIG)
    at_home = Reader(memory.model(model)).read(texts).nats[2]
    np.testing.assert_array_equal(at_home, Reader(model).read(texts).nats[2])
    read_in_succession(model, rule, SEGMENT, texts, memory)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    moved = memory.model(model)
    assert moved.decoder.weight is moved.embedding.weight
    assert torch.equal(moved.embedding.weight, memory.slow["embedding.weight"])
    assert (Reader(moved).read(texts).nats[2] != at_home).all()


def test_a_saved_memory_goes_on_bit_for_bit(tiny_model, texts, read, tmp_path):
    unbroken, whole = read(texts)
    first, memory = read(texts[:2])
    memory.save(tmp_path / "memory.safetensors")
    restored = LongTermMemory.load(tmp_path / "memory.safetensors", tiny_model())
    assert restored.config == CONFIG
    assert restored.num_articles == 2
    second, after = read(texts[2:], memory=restored)
    for broken, expected in zip(first + second, unbroken, strict=True):
        np.testing.assert_array_equal(broken, expected)
    assert after.num_articles == len(texts)
    assert all(torch.equal(after.slow[name], whole.slow[name]) for name in NAMES)


def test_the_memory_of_another_model_is_refused(tiny_model, texts, read, tmp_path):
    _, memory = read(texts[:1])
    memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="began from other weights; expected the checksum"):
        LongTermMemory.load(tmp_path / "memory.safetensors", tiny_model(seed=1))


def test_another_kind_of_file_is_refused(tiny_model, tmp_path):
    checkpoint.save(tmp_path / "other.safetensors", {"slow.x": torch.zeros(1)}, {"kind": "state"})
    with pytest.raises(ValueError, match=r"no long-term memory; expected the kind .* 'state'"):
        LongTermMemory.load(tmp_path / "other.safetensors", tiny_model())


def test_progress_is_told_each_article(tiny_model, learning, texts, fisher):
    model, told = tiny_model(), []
    rule, _ = learning("gradient descent", model, NAMES)
    memory = LongTermMemory(model, fisher, CONFIG)
    nats = read_in_succession(
        model, rule, SEGMENT, texts, memory, lambda number, of_text: told.append((number, of_text))
    )
    assert [number for number, _ in told] == list(range(len(texts)))
    assert all(of_text is own for (_, of_text), own in zip(told, nats, strict=True))
