"""Reading by a captured step, on a processor: what a graph is given and what it leaves.

The graph itself is stood in for by calls of what it was captured from; on a GPU, see
`tests/language/test_on_cuda.py`.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from metalm.language.reading import captured_step
from metalm.language.reading.article_starts import ArticleStarts
from metalm.language.reading.captured_step import Steps
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.training.meta_training_config import RuleTrainingConfig, starting_rule
from metalm.meta.parameters import choose
from metalm.meta.rules.gradient_descent import GradientDescent
from metalm.meta.rules.rms_decay import RmsDecay
from metalm.meta.rules.side_by_side import SideBySide

PATTERNS = ("embedding.*", "decoder.*", "*input_weight", "*_bias")


class Repeated:
    """Calls the function, with tensors of its own in and out, as a graph does."""

    def __init__(self, function, patience):
        self.function = function

    def __call__(self, *tensors):
        return tuple(found.clone() for found in self.function(*(t.clone() for t in tensors)))

    def release(self):
        pass


@pytest.fixture
def on_gpu(monkeypatch):
    """Has readers go the way of a GPU."""

    def go():
        monkeypatch.setattr(captured_step, "Captured", Repeated)
        monkeypatch.setattr(
            "metalm.language.reading.reader.Steps",
            lambda step, captured: Steps(step, captured=True),
        )

    return go


def rule_of(kind, model):
    names = choose(model, PATTERNS)
    torch.manual_seed(1)
    rms = {name: torch.rand_like(model.get_parameter(name)) + 0.1 for name in names}
    krause = RmsDecay(rms, 0.05, 0.01, 0.1)
    if kind == "rms":
        return krause
    if kind == "sgd":
        return GradientDescent(0.3, 0.01)
    if kind == "side by side":
        sizes = [krause.coefficients(), GradientDescent(0.3).coefficients()]
        return SideBySide(sizes)
    if kind == "flushing":
        starts = ArticleStarts(model.config.vocabulary_size).requires_grad_(False)
        torch.nn.init.normal_(starts.vectors.weight)
        starts.out.bias.fill_(0.0)
        return Flushing(krause, starts)
    return starting_rule(rms, RuleTrainingConfig(kind=kind)).requires_grad_(False)


@pytest.mark.parametrize(
    "kind", ["rms", "sgd", "side by side", "flushing", "momentum", "lstm", "gated", "none"]
)
def test_it_reads_the_same(tiny_model, on_gpu, kind):
    model = tiny_model().eval().requires_grad_(False)
    random = np.random.default_rng(0)
    texts = [random.integers(0, 11, length).astype(np.int32) for length in (33, 26, 41)]
    if kind == "side by side":
        texts = [texts[0]] * 2
    rule = None if kind == "none" else rule_of(kind, model)
    asked = {
        "cache": CacheGrid(thetas=(0.3, 1.0), window=20),
        "confidence": True,
        "temperatures": (0.8, 1.2),
    }

    def reader():
        return Reader(model, rule, choose(model, PATTERNS), 4, **asked)

    expected = reader().read(texts, 2)
    on_gpu()
    found = reader().read(texts, 2)
    for part in ("nats", "cache", "confidence", "tempered"):
        for one, other in zip(getattr(found, part), getattr(expected, part), strict=True):
            np.testing.assert_array_equal(one, other)
    assert found.fallbacks == expected.fallbacks


@pytest.mark.parametrize("kind", ["rms", "sgd", "side by side", "momentum", "rates", "none"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_step_asks_nowhere_what_a_number_is(tiny_model, waiting, monkeypatch, kind, bfloat16):
    monkeypatch.setattr(
        "metalm.language.network.products.quickest_float32", lambda left: nullcontext()
    )
    model = tiny_model().eval().requires_grad_(False)
    rule = None if kind == "none" else rule_of(kind, model)
    texts = [np.arange(20, dtype=np.int32) % 11] * 2
    reader = Reader(
        model, rule, choose(model, PATTERNS), 4, confidence=True, temperatures=(0.9,), surprise=0.5
    )
    reader.bfloat16 = bfloat16
    step = reader.step

    def watched(batch, memory):
        with waiting:
            return step(batch, memory)

    reader.step = watched
    reader.read(texts, 2)
    assert not waiting.seen
