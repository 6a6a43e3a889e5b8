"""The lines of Python that the README shows run as they stand."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metalm.adapt import AdaptiveReader
from metalm.language import pretrained
from metalm.language.pretrained import Pretrained
from metalm.language.pretrained_config import PretrainedConfig
from metalm.language.run.trained import load_model, load_rule
from metalm.language.text.vocabulary import Vocabulary
from metalm.meta.low_rank import LowRank
from metalm.meta.parameters import choose
from metalm.meta.rules import GradientDescent

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def lines_with(word):
    """The one indented block of Python in which a word stands, as text."""
    blocks = re.findall(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", README)
    (block,) = [block for block in blocks if word in block]
    return re.sub(r"^ {4}", "", block, flags=re.MULTILINE)


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.recurrent = nn.GRU(4, 5, batch_first=True)
        self.output = nn.Linear(5, 11)

    def forward(self, tokens, state):
        values, state = self.recurrent(self.embedding(tokens), state)
        return self.output(values), state


def test_low_rank_as_the_readme_has_it():
    (call,) = re.findall(r"`(LowRank\(.*?\))`", README)
    model = eval(call, {"LowRank": LowRank, "model": OwnModel()})
    assert any("output.weight" in name for name, _ in model.named_parameters())
    reader = AdaptiveReader(model, GradientDescent(0.1), fast=["factors.*"])
    assert np.isfinite(reader.read(np.arange(9)).nats[1:]).all()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_with_the_shipped_model(trained_run, here, monkeypatch):
    config, corpus, run = trained_run
    model = load_model(run, "joint", config)
    tiny = Pretrained(
        model=model,
        rule=load_rule(run, "joint", config, choose(model, config.rule.adapt)),
        vocabulary=Vocabulary.load(run.vocabulary_path),
        config=PretrainedConfig(model=config.model, rule=config.rule),
    )
    tiny.save_pretrained(here / "tiny")
    monkeypatch.setattr(pretrained, "SHIPPED", here / "tiny")
    names = {"text": corpus.test[0].text, "more": corpus.test[1].text}
    exec(lines_with("Pretrained.from_pretrained"), names)
    words = len(corpus.test[0].tokens), len(corpus.test[1].tokens)
    assert np.isfinite(names["nats"]).all()
    assert len(names["nats"]) == words[1]
    assert names["state"].num_tokens == sum(words)
    assert (here / "folder/config.json").read_bytes() == (here / "tiny/config.json").read_bytes()
    exec(lines_with("LongTermMemory"), names | {"corpus": corpus}, kept := {})
    assert kept["memory"].num_articles == 1
    assert kept["memory"].moved() > 0
    first, second = (kept["later"], names["reader"])
    text = tiny.encode(names["text"])
    assert (first.read(text).nats != second.read(text).nats).any()


def test_with_a_model_of_ones_own(here):
    torch.manual_seed(0)
    draw = np.random.default_rng(1).integers
    names = {
        "model": OwnModel(),
        "training_texts": [draw(0, 11, 120), draw(0, 11, 90)],
        "other_texts": [draw(0, 11, 70)],
        "article": draw(0, 11, 45),
        "the_rest": draw(0, 11, 25),
    }
    exec(lines_with("import AdaptiveReader, count_gradients"), names)
    assert len(names["losses"]) == 10
    assert np.isfinite(names["nats"]).all()
    assert names["state"].num_tokens == 45 + 25
    assert set(names["state"].fast) == {"embedding.weight", "output.weight", "output.bias"}


def test_the_core_by_itself():
    """Against a plain loop, differentiated twice."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    support, query = torch.randn(6, 3).double(), torch.randn(5, 3).double()

    def loss(model, batch):
        return (model(batch) - batch[:, :1].sin()).square().mean()

    exec(
        lines_with("import fork"),
        {"network": network, "support": support, "query": query, "loss": loss},
    )
    weights = dict(network.named_parameters())
    for _ in range(5):
        value = loss(partial(torch.func.functional_call, network, weights), support)
        gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    after = loss(partial(torch.func.functional_call, network, weights), query)
    expected = torch.autograd.grad(after, list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_with_a_model_of_transformers(here):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "n_positions": 90, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    names = {"gpt2": transformers.GPT2LMHeadModel(config)}
    exec(lines_with("import AdaptiveReader, CausalModel"), names)
    with pytest.raises(ValueError, match="expected at most 45 tokens beside a context of 45"):
        names["reader"].read([1] * 200)
    short = names["reader"].read([1] * 40)
    assert np.isfinite(short.nats[1:]).all()
    assert all("mlp" in name for name in short.state.fast)
