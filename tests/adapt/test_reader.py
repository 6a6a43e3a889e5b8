"""Reading with a model of one's own, against a plain loop and against metalm's own reading."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metalm.adapt import AdaptiveReader
from metalm.adapt.reader import evaluating
from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.reader import Reader
from metalm.meta.low_rank import LowRank
from metalm.meta.rules import GradientDescent, LearnedRates
from metalm.meta.rules.adam import Adam
from metalm.meta.rules.kinds import learned_rule

SEGMENT = 4


def descend(weight, gradient, slow):
    return weight - 0.7 * gradient + 0.05 * (slow - weight)


@pytest.fixture
def reader(recurrent):
    return AdaptiveReader(recurrent, GradientDescent(0.7, 0.05), segment=SEGMENT, start_token=2)


@pytest.mark.parametrize("number", range(5))
def test_a_text_is_read_as_a_plain_loop_reads_it(reader, texts, plain_read, number):
    nats, state = reader.read(texts[number])
    expected, weights = plain_read(reader.model, texts[number], SEGMENT, descend, start_token=2)
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    assert state.fast.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(state.fast[name], weight, rtol=1e-12, atol=1e-14)
    assert state.num_tokens == len(texts[number])
    assert state.last_token == texts[number][-1]


def test_without_a_start_token_the_first_token_has_no_score(recurrent, texts, plain_read):
    reader = AdaptiveReader(recurrent, GradientDescent(0.7, 0.05), segment=SEGMENT)
    nats, state = reader.read(texts[0])
    expected, _ = plain_read(recurrent, texts[0], SEGMENT, descend)
    assert np.isnan(nats[0])
    np.testing.assert_allclose(nats[1:], expected, rtol=1e-12)
    assert state.num_tokens == len(texts[0])
    alone, begun = reader.read(texts[1])
    assert np.isnan(alone).tolist() == [True]
    rest, _ = reader.read(texts[0], begun)
    assert np.isfinite(rest).all()


def test_without_a_rule_nothing_is_learnt(recurrent, texts, plain_read):
    reader = AdaptiveReader(recurrent, segment=SEGMENT, start_token=2)
    nats, state = reader.read(texts[0])
    expected, _ = plain_read(recurrent, texts[0], SEGMENT, lambda w, g, w0: w, start_token=2)
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    for name, weight in recurrent.named_parameters():
        assert torch.equal(state.fast[name], weight)


def test_metalms_own_model_is_read_as_its_own_reader_does(texts):
    torch.manual_seed(0)
    sizes = {"vocabulary_size": 11, "embedding_size": 3, "hidden_size": 5}
    model = LanguageModel(ModelConfig(**sizes)).double()
    names = [name for name, _ in model.named_parameters()]
    rms = {name: torch.rand_like(weight) + 0.01 for name, weight in model.named_parameters()}
    rule = LearnedRates(rms, rate=0.2, decay=0.03).requires_grad_(False)
    adaptive = AdaptiveReader(
        model,
        rule,
        segment=SEGMENT,
        start_token=0,
        initial_state=model.initial_state,
        batch_first=False,
    )
    expected = Reader(model, rule, names, SEGMENT).read([t.astype(np.int32) for t in texts], 3)
    for reading, nats in zip(adaptive.read_texts(texts), expected.nats, strict=True):
        np.testing.assert_allclose(reading.nats, nats, rtol=1e-10)


class Begins(nn.Module):
    """Stands for the network that tells where articles begin: at every 3."""

    def forward(self, windows):
        return (windows[..., -1] == 3).float() - 0.5


def test_texts_that_are_read_together_flush_for_themselves(recurrent, texts):
    inner = GradientDescent(0.7, 0.05)
    flushing = AdaptiveReader(recurrent, Flushing(inner, Begins(), rows=False), segment=SEGMENT)
    texts = [*texts, np.array([1, 4, 5, 7, 6, 2, 3, 2, 2, 9, 10, 4, 5])]
    alone = flushing.read_texts(texts)
    for one, other in zip(flushing.read_texts(texts, together=3), alone, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-10)
    plain = flushing.with_rule(inner).read_texts(texts)
    assert abs(alone[-1].nats - plain[-1].nats)[1:].max() > 0.01


@pytest.mark.parametrize("place", range(13))
def test_the_future_changes_no_bit_of_the_past(reader, texts, place):
    changed = texts[2].copy()
    changed[place:] = (changed[place:] + 1 + np.arange(13 - place) % 9) % 11
    before, after = reader.read(texts[2]).nats, reader.read(changed).nats
    np.testing.assert_array_equal(before[:place], after[:place])
    assert (before[place:] != after[place:]).all()


@pytest.mark.parametrize("place", [0, 6, 12])
def test_the_future_changes_no_bit_of_the_past_of_texts_read_together(reader, texts, place):
    changed = [text.copy() for text in texts]
    changed[2][place:] = (changed[2][place:] + 3) % 11
    before = reader.read_texts(texts, together=3)
    after = reader.read_texts(changed, together=3)
    for number in range(5):
        end = place if number == 2 else None
        np.testing.assert_array_equal(before[number].nats[:end], after[number].nats[:end])
    assert (before[2].nats[place:] != after[2].nats[place:]).all()


def test_what_was_read_is_felt_later(reader, texts):
    """The test above has power: only the weights carry the first segments so far."""
    changed = texts[0].copy()
    changed[:SEGMENT] = (changed[:SEGMENT] + 3) % 11
    late = slice(12, None)
    learnt = [reader.read(text).nats[late] for text in (texts[0], changed)]
    still = reader.with_rule(None)
    static = [still.read(text).nats[late] for text in (texts[0], changed)]
    assert abs((learnt[0] - learnt[1]) - (static[0] - static[1])).max() > 1e-3


@pytest.mark.parametrize("cut", [4, 8, 16])
def test_read_in_parts_is_the_whole_bit_for_bit(reader, texts, cut):
    whole, end = reader.read(texts[0])
    first, state = reader.read(texts[0][:cut])
    kept = {name: weight.clone() for name, weight in state.fast.items()}
    second, last = reader.read(torch.from_numpy(texts[0][cut:]), state)
    np.testing.assert_array_equal(np.concatenate((first, second)), whole)
    for name, weight in end.fast.items():
        assert torch.equal(last.fast[name], weight)
        assert torch.equal(state.fast[name], kept[name])
    texts[0].flags.writeable = False  # as memory-mapped articles are
    again, _ = reader.read(texts[0][cut:], state)
    np.testing.assert_array_equal(again, second)
    again, _ = reader.read(list(texts[0][cut:]), state)
    np.testing.assert_array_equal(again, second)
    assert last.num_tokens == end.num_tokens == 17


@pytest.mark.parametrize("together", [2, 3, 7])
def test_texts_read_together_are_read_as_one_by_one(reader, texts, together):
    alone = reader.read_texts(texts)
    several = reader.read_texts(texts, together=together)
    for one, other in zip(alone, several, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-10)
        for name, weight in one.state.fast.items():
            torch.testing.assert_close(other.state.fast[name], weight)
        torch.testing.assert_close(other.state.model_state, one.state.model_state)
        assert other.state.num_tokens == one.state.num_tokens
    onward = [texts[0], *texts[2:], texts[0]]
    further = reader.read_texts(onward, [r.state for r in several], together=together)
    expected = reader.read_texts(onward, [r.state for r in alone])
    for one, other in zip(expected, further, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-10)


@pytest.mark.parametrize("kind", ["rates", "gated", "lstm"])
def test_learned_rules_with_memories_of_their_own(recurrent, texts, kind):
    """Alone, together and in parts; the learned rates alone say what untrained networks give."""
    rms = {name: torch.rand_like(weight) + 0.01 for name, weight in recurrent.named_parameters()}
    rates = LearnedRates.from_krause(rms, 0.1, 0.03, 0.2)
    rule = learned_rule(kind, rates).requires_grad_(False)
    reader = AdaptiveReader(recurrent, rule, segment=SEGMENT, start_token=2)
    alone = reader.read_texts(texts)
    plain = reader.with_rule(rates).read_texts(texts)
    together = reader.read_texts(texts, together=3)
    for one, other, expected in zip(alone, together, plain, strict=True):
        np.testing.assert_allclose(one.nats, expected.nats, rtol=1e-6)
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-6)
    first, state = reader.read(texts[0][:8])
    second, _ = reader.read(texts[0][8:], state)
    np.testing.assert_array_equal(np.concatenate((first, second)), alone[0].nats)


def test_texts_that_go_on_after_different_numbers_of_updates(recurrent, texts):
    """Adam counts its updates with a plain number, which must not be another text's."""
    rule = Adam(0.05).requires_grad_(False)
    reader = AdaptiveReader(recurrent, rule, segment=SEGMENT, start_token=2)
    states = [reader.read(texts[0][: SEGMENT * count]).state for count in (1, 3, 2)]
    onward = [texts[0], texts[0], texts[2]]
    together = reader.read_texts(onward, states, together=3)
    for text, state, found in zip(onward, states, together, strict=True):
        np.testing.assert_allclose(found.nats, reader.read(text, state).nats, rtol=1e-10)


def test_the_model_is_left_as_it_was(reader, texts):
    model = reader.model.train()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    reader.read_texts(texts, together=2)
    assert model.training
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.requires_grad
        assert weight.grad is None


class TwoNames(nn.Module):
    """One layer, twice over."""

    def __init__(self):
        super().__init__()
        self.embedding, self.one = nn.Embedding(11, 5), nn.Linear(5, 5)
        self.other = self.one

    def forward(self, tokens, state):
        hidden = self.other(torch.tanh(self.one(self.embedding(tokens))))
        return hidden @ self.embedding.weight.t(), state


def test_a_model_with_a_layer_under_two_names_is_left_as_it_was(texts):
    model = TwoNames()
    weights = dict(model.named_parameters())
    before = {name: weight.clone() for name, weight in weights.items()}
    reader = AdaptiveReader(model, GradientDescent(0.5), segment=4)
    _, state = reader.read(texts[0])
    assert dict(model.named_parameters()) == weights
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert not torch.equal(weight, state.fast[name])


def test_each_part_of_the_model_keeps_its_mode(texts):
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


class Remembering(nn.Module):
    """Logits from the mean of the tokens so far, which it writes into its state in place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 44, dtype=torch.float64).view(11, 4))

    def forward(self, tokens, state):
        logits = []
        for token in tokens[0]:
            state["sum"] += nn.functional.one_hot(token, 11)
            state["count"] += 1
            logits.append(state["sum"] / state["count"] @ self.table @ self.table.t())
        return torch.stack(logits)[None], state


def test_a_model_that_writes_its_state_in_place_leaves_the_callers_alone():
    """What it is told to start from, too, which here is the same tensor for every text."""
    begin = {"sum": torch.zeros(11, dtype=torch.float64), "count": torch.zeros(())}
    reader = AdaptiveReader(
        Remembering(), GradientDescent(0.1), segment=3, start_token=2, initial_state=lambda _: begin
    )
    first = reader.read([1, 2, 3, 4])
    again = [reader.read([6, 7, 8, 9], first.state).nats for _ in range(2)]
    np.testing.assert_array_equal(*again)
    np.testing.assert_array_equal(reader.read([1, 2, 3, 4]).nats, first.nats)
    assert begin["count"] == 0


def test_reading_learns_under_inference_mode(reader, texts):
    expected = reader.read(texts[0])
    with torch.inference_mode():
        tokens = torch.from_numpy(texts[0]) + 0
        found = reader.read(tokens, reader.start())
    np.testing.assert_array_equal(found.nats, expected.nats)


class Surprised(nn.Module):
    """Sure that token 0 comes next, so that any other costs 30 nats more."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(30.0 * nn.functional.one_hot(torch.tensor(0), 11).double())

    def forward(self, tokens, state):
        return self.bias.expand(*tokens.shape, 11), state


def test_one_token_that_surprises_is_no_rule_that_blew_up():
    """Twice the uniform guess is 4.8 nats a token; of fewer tokens than four the mean tells little.

    30 nats over four tokens are 7.5: lost, as they are where a segment of four costs that.
    """
    reader = AdaptiveReader(Surprised(), GradientDescent(1e-3), segment=10, start_token=0)
    few = [np.array([0] * count + [1]) for count in (0, 1, 2, 3, 6)]
    assert [reader.read(text).state.fallbacks for text in few] == [1, 1, 1, 1, 0]
    calm = AdaptiveReader(Surprised(), GradientDescent(1e-3), segment=10, start_token=0)
    with torch.no_grad():
        calm.model.bias.mul_(0.6)  # 18 nats: 4.5 a token, were they four
    assert [calm.read(text).state.fallbacks for text in few] == [0] * 5


def test_only_the_chosen_weights_learn(recurrent, texts):
    reader = AdaptiveReader(recurrent, GradientDescent(0.7), ["out*"], start_token=2, segment=4)
    _, state = reader.read(texts[0])
    assert set(state.fast) == {"embedding.weight", "output.bias"}  # tied: output.weight as well
    for name, weight in state.fast.items():
        assert not torch.equal(weight, recurrent.get_parameter(name))


def test_torchs_lstm_time_first(plain_lstm, texts):
    """Against the same model in metalm's own recurrence, which reads with its own code."""
    reader = AdaptiveReader(
        plain_lstm, GradientDescent(0.5), segment=SEGMENT, start_token=2, batch_first=False
    )
    nats, state = reader.read(texts[0])
    assert not torch.equal(state.fast["lstm.weight_hh_l0"], plain_lstm.lstm.weight_hh_l0)
    slow = dict(plain_lstm.named_parameters())
    with torch.no_grad():  # static up to the end of the first segment
        logits, _ = plain_lstm(torch.tensor([[2, *texts[0][:3]]]).t(), None)
        expected = -logits[:, 0].log_softmax(-1)[range(4), texts[0][:4]]
    np.testing.assert_allclose(nats[:SEGMENT], expected.numpy(), rtol=1e-12)
    # One update by hand, then the second segment.
    twin = type(plain_lstm)().double()
    twin.load_state_dict({name: weight.detach().clone() for name, weight in slow.items()})
    logits, hidden = twin(torch.tensor([[2, *texts[0][:3]]]).t(), None)
    nn.functional.cross_entropy(logits[:, 0], torch.from_numpy(texts[0][:4])).backward()
    with torch.no_grad():
        for weight in twin.parameters():
            weight -= 0.5 * weight.grad
        logits, _ = twin(torch.from_numpy(texts[0][3:7, None]), hidden)
        expected = -logits[:, 0].log_softmax(-1)[range(4), texts[0][4:8]]
    np.testing.assert_allclose(nats[SEGMENT : 2 * SEGMENT], expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("together", [1, 3])
def test_a_rule_that_blows_up_falls_back_to_the_slow_weights(recurrent, texts, together):
    reader = AdaptiveReader(recurrent, GradientDescent(1e6), segment=SEGMENT, start_token=2)
    readings = reader.read_texts(texts, together=together)
    state = readings[0].state
    assert state.fallbacks > 0
    assert all(np.isfinite(reading.nats).all() for reading in readings)
    assert all(bool(weight.isfinite().all()) for weight in state.fast.values())
    # The first segment's update blows up, the second is scored so; the third begins at W_0 again.
    fresh = replace(reader.start(), last_token=int(texts[0][7]))
    expected = reader.with_rule(None).read(texts[0][8:12], fresh).nats
    np.testing.assert_allclose(readings[0].nats[8:12], expected, rtol=1e-12)
    assert readings[0].nats[4:8].mean() > 2 * np.log(11)


class Silent(nn.Module):
    """A model that gives whatever it was told to give."""

    def __init__(self, output):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.output = output

    def forward(self, tokens, state):
        return self.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(1, 2, 3), r"expected \(logits, state\), found Tensor"),
        ((torch.zeros(2, 1, 3), None), r"found the shape \[2, 1, 3\]; check batch_first"),
        ((torch.zeros(1, 3), None), r"found the shape \[1, 3\]"),
    ],
)
def test_a_model_that_gives_something_else(output, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveReader(Silent(output)).read([0, 1, 2])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"expected at least one integer in one dimension, found the shape \[0\]"),
        ([[1, 2]], r"found the shape \[1, 2\] of int64"),
        ([1.5, 2.0], r"found the shape \[2\] of float64"),
        (
            [1, -3],
            "a token is no id; expected numbers from 0 to 9223372036854775807, found -3 to 1",
        ),
        (
            np.array([1, 2**63], dtype=np.uint64),
            "found 1 to 9223372036854775808; use the tokenizer",
        ),
        ("hello", r"found the shape \[\] of <U5"),
        (iter([1, 2]), r"found the shape \[\] of object"),
        (torch.tensor([0.5, 2.0], dtype=torch.bfloat16), r"found the shape \[2\] of float64"),
        ([1, 11, 2], "beyond the model's vocabulary; expected ids that the model has, found 1 to"),
    ],
)
def test_what_is_no_text(reader, tokens, message):
    with pytest.raises(ValueError, match=message):
        reader.read(tokens)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int16"])
def test_token_ids_of_every_whole_type(reader, texts, kind):
    expected = reader.read(texts[0]).nats
    np.testing.assert_array_equal(reader.read(texts[0].astype(kind)).nats, expected)
    tensor = torch.from_numpy(texts[0].astype(kind))
    np.testing.assert_array_equal(reader.read(tensor).nats, expected)


def test_other_wrong_arguments(recurrent, plain_lstm, texts):
    rms = {"output.bias": torch.ones(11, dtype=torch.float64)}
    rule = LearnedRates(rms)
    assert AdaptiveReader(recurrent, rule).fast_names == ("output.bias",)
    with pytest.raises(
        ValueError, match=r"made for other parameters; expected .*found output.bias"
    ):
        AdaptiveReader(recurrent, rule, ["*"])
    with pytest.raises(ValueError, match=r"expected a torch.nn.Module, found function; make a"):
        AdaptiveReader(lambda tokens, state: (recurrent(tokens, state), None))
    with pytest.raises(ValueError, match=r"a segment has tokens; expected at least 1, found 0"):
        AdaptiveReader(recurrent, segment=0)
    with pytest.raises(ValueError, match=r"no parameter matches 'decoder.\*'"):
        AdaptiveReader(recurrent, fast=["decoder.*"])
    with pytest.raises(ValueError, match=r"expected float32 or float64, found bfloat16"):
        AdaptiveReader(type(recurrent)().bfloat16())
    reader = AdaptiveReader(recurrent)
    with pytest.raises(ValueError, match="the states do not fit the texts; expected 5, found 1"):
        reader.read_texts(texts, [reader.start()])
    with pytest.raises(ValueError, match="expected at least 1, found 0"):
        reader.read_texts(texts, together=0)
    lstm = AdaptiveReader(plain_lstm, batch_first=False, segment=SEGMENT)
    with pytest.raises(ValueError, match=r"cannot read several texts at once; .*together at 1"):
        lstm.read_texts(texts, together=2)


def test_low_rank_fast_weights_of_full_rank_learn_as_the_whole_tensor(recurrent, texts):
    """With orthonormal V, U alone by gradient descent moves W by -rate G V^T V = -rate G."""
    name = "hidden.weight"
    whole = AdaptiveReader(
        recurrent, GradientDescent(0.7, 0.05), fast=[name], segment=SEGMENT, start_token=2
    )
    rank = recurrent.hidden.in_features
    low = LowRank(recurrent, [name], rank)
    left = "factors.hidden/weight.left"
    factored = AdaptiveReader(
        low, GradientDescent(0.7, 0.05), fast=[left], segment=SEGMENT, start_token=2
    )
    found, state = factored.read(texts[0])
    expected, _ = whole.read(texts[0])
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert set(state.fast) == {left}


def test_low_rank_fast_weights_keep_little_and_learn(recurrent, texts):
    low = LowRank(recurrent, ["hidden.weight"], 1)
    reader = AdaptiveReader(
        low, GradientDescent(0.7), fast=["factors.*"], segment=SEGMENT, start_token=2
    )
    found, state = reader.read(texts[2])
    static, _ = AdaptiveReader(recurrent, segment=SEGMENT, start_token=2).read(texts[2])
    assert sum(weight.numel() for weight in state.fast.values()) == 5 + 5
    np.testing.assert_allclose(found[:SEGMENT], static[:SEGMENT], rtol=1e-10)
    assert abs(found[SEGMENT:] - static[SEGMENT:]).max() > 1e-4
