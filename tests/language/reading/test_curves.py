import numpy as np
import pytest
import torch

from metalm.language.reading.curves import (
    DISTANCE,
    FLUSH,
    UPDATE,
    CurveRecorder,
    Curves,
    along_articles,
)
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.run.scoring import score_split
from metalm.meta.rules.gated import Gated
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.update_rule import AbstractUpdateRule

SEGMENT = 4
NAMES = ("decoder.bias", "embedding.weight")
LENGTHS = (7, 1, 13, 5, 10)  # of the texts of conftest.py


class March(AbstractUpdateRule):
    """Every weight goes a hundredth further at each step, whatever the gradient."""

    def forward(self, fast, gradients, slow, state, coefficients=None):
        return {name: weight + 0.01 for name, weight in fast.items()}, state


def record(model, texts, rule, rows, every=1):
    reader = Reader(model, rule, NAMES, SEGMENT)
    recorder = CurveRecorder(reader.slow, rule, len(texts), every)
    readings = reader.read(texts, rows, recorder=recorder)
    plain = Reader(model, rule, NAMES, SEGMENT).read(texts, rows)
    for noted, unnoted in zip(readings.nats, plain.nats, strict=True):
        np.testing.assert_array_equal(noted, unnoted)
    return {curves.quantity: curves for curves in readings.curves}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_distance_of_weights_that_march_on(tiny_model, texts, rows, every):
    """After t steps of a hundredth, n weights are 0.01 t sqrt(n) from home."""
    model = tiny_model()
    curves = record(model, texts, March(), rows, every)[DISTANCE]
    for text, places, values in zip(texts, curves.places, curves.values, strict=True):
        ends = [min(start + SEGMENT, len(text)) for start in range(0, len(text), SEGMENT)]
        steps = np.arange(1, len(ends) + 1)
        assert places.tolist() == ends[::every]
        for name, value in zip(curves.names, values.T, strict=True):
            home = model.state_dict()[name]
            expected = 0.01 * steps[::every] * home.numel() ** 0.5 / home.norm().item()
            np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_weights_at_zero_have_their_distance_as_it_is(tiny_model, texts):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.bias.zero_()
    curves = record(model, texts, March(), 1)[DISTANCE]
    first = curves.values[0][0, curves.names.index("decoder.bias")]
    assert first == pytest.approx(0.01 * 11**0.5, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_gates_that_have_learnt_nothing(tiny_model, texts, statistics, rows):
    """They update fully, and flush as much as the learned rates decay."""
    model = tiny_model()
    rms = {name: size for name, size in statistics(model).items() if name in NAMES}
    rule = Gated(LearnedRates(rms, rate=0.2, decay=0.03)).requires_grad_(False)
    curves = record(model, texts, rule.double(), rows)
    assert set(curves) == {DISTANCE, UPDATE, FLUSH}
    for quantity, expected in ((UPDATE, 1.0), (FLUSH, 0.03)):
        for text, values in zip(texts, curves[quantity].values, strict=True):
            assert values.shape == (-(-len(text) // SEGMENT), 2)
            np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_a_long_text_is_cut_where_its_articles_end():
    """A note at the very end of an article is the article's own."""
    places, values = np.array([2, 3, 5, 6, 9]), np.arange(5.0, dtype=np.float32)[:, None]
    cut = along_articles(Curves(FLUSH, ("w",), [places], [values]), [3, 1, 2, 3])
    assert [p.tolist() for p in cut.places] == [[2, 3], [], [1, 2], [3]]
    assert [v[:, 0].tolist() for v in cut.values] == [[0, 1], [], [2, 3], [4]]


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_the_evaluation_has_traces_by_words_and_keeps_them(
    tiny_model, texts, article_set, statistics, tmp_path, mode
):
    model = tiny_model()
    models = TrainedModels(
        models={"control": model}, rules={}, rival_names=NAMES, statistics={4: statistics(model)}
    )
    settings = {"rate": 0.3, "decay": 0.02}
    methods = [
        Method(name="static", model="control", learning="none", segment=5),
        Method(name="sgd", model="control", learning="sgd", segment=4, settings=settings),
    ]
    articles, store = article_set(texts), ReadingStore(tmp_path)
    read, recalled = (score_split(models, methods, articles, mode, store).traces for _ in range(2))
    assert sorted(trace.name for trace in read) == [*NAMES]
    # Each token is a word here. Distances are taken at the first update and at every eighth more.
    ends = np.minimum(np.arange(0, sum(LENGTHS), 4 * 8) + 4, sum(LENGTHS))
    starts = np.cumsum((0, *LENGTHS))
    for trace, again in zip(read, recalled, strict=True):
        assert trace.method == "sgd"
        for number, words in enumerate(trace.words):
            whole = ends[(ends > starts[number]) & (ends <= starts[number + 1])] - starts[number]
            expected = [min(4, LENGTHS[number])] if mode == "reset" else whole.tolist()
            assert words.tolist() == expected
        for one, other in zip(
            (*trace.words, *trace.values), (*again.words, *again.values), strict=True
        ):
            np.testing.assert_array_equal(one, other)
