"""The state of a reading on disk: what comes back, and what is refused."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metalm.adapt import AdaptiveReader, count_gradients, krause_rule
from metalm.meta.rules import GradientDescent
from metalm.meta.update_rule import AbstractUpdateRule
from metalm.training import checkpoint


class Velocity(NamedTuple):
    """The state of a rule with a memory."""

    values: dict[str, Tensor]
    steps: int


class Momentum(AbstractUpdateRule):
    def initial_state(self, fast):
        return Velocity({name: torch.zeros_like(weight) for name, weight in fast.items()}, 0)

    def forward(self, fast, gradients, slow, state, coefficients=None):
        values = {name: 0.5 * state.values[name] - 0.3 * gradients[name] for name in fast}
        new = {name: weight + values[name] for name, weight in fast.items()}
        return new, Velocity(values, state.steps + 1)


class Hidden(NamedTuple):
    short: Tensor
    past: list[Tensor]


class NamedState(nn.Module):
    """The last token and the one before in a named tuple with a list inside."""

    def __init__(self):
        super().__init__()
        self.short = nn.Embedding(11, 11)
        self.long = nn.Embedding(11, 11)

    def initial_state(self, rows):
        return Hidden(torch.zeros(rows, dtype=torch.int64), [torch.zeros(rows, 11).double()])

    def forward(self, tokens, state):
        before = torch.cat((state.short[:, None], tokens[:, :-1]), 1)
        logits = self.short(tokens) + self.long(before) + 0.1 * state.past[0][:, None]
        return logits, Hidden(tokens[:, -1], [logits[:, -1]])


@pytest.fixture
def reader(recurrent):
    return AdaptiveReader(recurrent, GradientDescent(0.7, 0.05), segment=4, start_token=2)


@pytest.fixture
def named_reader():
    torch.manual_seed(1)
    model = NamedState().double()
    return AdaptiveReader(
        model, Momentum(), segment=4, start_token=2, initial_state=model.initial_state
    )


@pytest.mark.parametrize("kind", ["reader", "named_reader"])
def test_reading_on_from_a_file_is_reading_on(request, texts, tmp_path, kind):
    reader = request.getfixturevalue(kind)
    whole, _ = reader.read(texts[0])
    first, state = reader.read(texts[0][:8])
    reader.save(state, tmp_path / "folder" / "state.safetensors")
    restored = reader.load(tmp_path / "folder" / "state.safetensors")
    second, last = reader.read(texts[0][8:], restored)
    np.testing.assert_array_equal(np.concatenate((first, second)), whole)
    assert last.num_tokens == 17
    assert type(restored.model_state) is type(state.model_state)
    assert type(restored.rule_state) is type(state.rule_state)


def test_a_file_can_be_inspected_without_metalm(reader, texts, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, state = reader.read(texts[0])
    reader.save(state, tmp_path / "state.safetensors")
    found = safetensors.load_file(tmp_path / "state.safetensors")
    assert torch.equal(found["fast.embedding.weight"], state.fast["embedding.weight"])


def test_what_is_refused(reader, recurrent, texts, tmp_path):
    path = tmp_path / "state.safetensors"
    _, state = reader.read(texts[0])
    reader.save(state, path)
    with pytest.raises(ValueError, match=r"there is no checkpoint .*nowhere"):
        reader.load(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut is truncated or altered"):
        reader.load(tmp_path / "cut")
    checkpoint.save(tmp_path / "other", {"a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match=r"is not the state of a reading; .* found None"):
        reader.load(tmp_path / "other")
    for rule, kind in (
        (None, "no rule"),
        (krause_rule(count_gradients(reader, texts)), "LearnedRates"),
    ):
        with pytest.raises(ValueError, match=f"another kind of rule; expected {kind}, found Grad"):
            reader.with_rule(rule).load(path)
    fewer = AdaptiveReader(recurrent, GradientDescent(0.7), ["hidden.*"])
    with pytest.raises(ValueError, match=r"expected embedding.weight of shape nothing, found \(11"):
        fewer.load(path)
    with torch.no_grad():
        recurrent.output.bias[0] += 1e-9
    with pytest.raises(ValueError, match="belongs to a model with other weights; expected"):
        reader.load(path)


def test_a_named_state_that_could_not_come_back_is_refused(named_reader, texts, tmp_path):
    model = named_reader.model

    class Begins(nn.Module):
        """The same, beginning with None."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens, state):
            start = self.inner.initial_state(len(tokens))
            return self.inner(tokens, start if state is None else state)

    reader = AdaptiveReader(Begins(), GradientDescent(0.7), segment=4, start_token=2)
    _, state = reader.read(texts[0])
    with pytest.raises(ValueError, match=r"expected an initial_state .* found none; give one to"):
        reader.save(state, tmp_path / "state.safetensors")
    assert list(tmp_path.iterdir()) == []
