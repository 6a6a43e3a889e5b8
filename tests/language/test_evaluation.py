import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from metalm.language.articles import SCHEMA, ArticleSet
from metalm.language.cache import CacheConfig, mixed_nats
from metalm.language.evaluation import compared_methods, score_split, tune_all
from metalm.language.methods import Method, TrainedModels
from metalm.language.reading import CacheGrid, Reader
from metalm.language.reading_store import ReadingStore
from metalm.language.tuning import Trial, TuningConfig
from metalm.meta.rules.learned_rates import LearnedRates

CACHES = (CacheConfig(theta=0.5, share=0.1, window=6), CacheConfig(theta=2.0, share=0.3, window=6))
RATE = {"rate": 0.3, "decay": 0.02}
SCALES = {"rate_scale": 1.5, "decay_scale": 2.0}
METHODS = (
    Method(name="static", model="control", learning="none", segment=5),
    Method(name="cache", model="control", learning="none", segment=5, cache=CACHES[0]),
    Method(name="sgd", model="control", learning="sgd", segment=4, settings=RATE),
    Method(
        name="sgd + cache",
        model="control",
        learning="sgd",
        segment=4,
        settings=RATE,
        cache=CACHES[1],
    ),
    Method(name="metalm", model="joint", learning="joint", segment=3, settings=SCALES),
)


@pytest.fixture
def articles():
    """Articles whose words have one to three tokens each."""
    random = np.random.default_rng(4)
    rows = []
    for number, count in enumerate((5, 2, 8)):
        words = np.repeat(np.arange(count), random.integers(1, 4, count))
        tokens = random.integers(0, 11, len(words))
        text = " ".join(f"w{n}" for n in range(count - 1)) + "\n"
        rows.append(
            {
                "title": f"article {number}",
                "text": text,
                "tokens": tokens.tolist(),
                "words": words.tolist(),
                "num_words": count,
            }
        )
    return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))


@pytest.fixture
def models(tiny_model, statistics):
    model = tiny_model()
    rms = statistics(model)
    names = ("embedding.weight", "decoder.bias")
    rule = LearnedRates({name: rms[name] for name in names}, rate=0.2).requires_grad_(False)
    return TrainedModels(
        models={"control": model, "joint": tiny_model(seed=1)},
        rules={"joint": rule},
        rival_names=tuple(rms),
        statistics={4: rms},
    )


def expected_nats(models, method, texts):
    """Token losses of one method, without the code that shares readings."""
    grid = None if method.cache is None else CacheGrid(thetas=(method.cache.theta,), window=6)
    names = models.fast_names(method)
    reader = Reader(models.model(method), models.rule(method), names, method.segment, grid)
    readings = reader.read(texts)
    if method.cache is None:
        return readings.nats
    return [
        mixed_nats(torch.from_numpy(n), torch.from_numpy(c[0]), method.cache.share).numpy()
        for n, c in zip(readings.nats, readings.cache, strict=True)
    ]


@pytest.mark.parametrize(("mode", "rows"), [("reset", 1), ("reset", 2), ("carry", 1)])
def test_every_method_pays_for_every_word(models, articles, tmp_path, mode, rows):
    told, store = [], ReadingStore(tmp_path)
    scored = score_split(models, METHODS, articles, mode, store, rows, lambda *p: told.append(p))
    assert scored.scores.methods == tuple(method.name for method in METHODS)
    texts = [article.tokens for article in articles]
    for method in METHODS:
        if mode == "reset":
            nats = expected_nats(models, method, texts)
        else:
            (whole,) = expected_nats(models, method, [np.concatenate(texts)])
            nats = np.split(whole, np.cumsum([len(text) for text in texts])[:-1])
        for article, found, costs in zip(articles, scored.scores.articles, nats, strict=True):
            words = [0.0] * len(found.words)
            for word, cost in zip(article.words, costs, strict=True):
                words[word] += cost
            np.testing.assert_allclose(found.losses[method.name], words, rtol=1e-9)
            assert found.title == article.title
            assert found.words[-1] == "\n"
        cost = scored.cost[method.name]
        assert cost["tokens_per_second"] > 0
        assert cost["fallbacks"] == 0
    # Methods that differ in their cache share a reading: three readings of all tokens.
    assert sum(tokens for _, tokens, _ in told) == 3 * articles.num_tokens


def test_methods_cost_something_different(models, articles, tmp_path):
    scores = score_split(models, METHODS, articles, "reset", ReadingStore(tmp_path)).scores
    totals = [float(scores.nats(name).sum()) for name in scores.methods]
    assert len({round(total, 6) for total in totals}) == len(METHODS)


def test_a_stopped_evaluation_goes_on_with_what_it_has_read(models, articles, tmp_path):
    def stop(name, tokens, nats):
        if name == "metalm":
            raise KeyboardInterrupt

    store, told = ReadingStore(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        score_split(models, METHODS, articles, "reset", store, 2, stop)
    resumed = score_split(
        models, METHODS, articles, "reset", store, 2, lambda *p: told.append(p[0])
    )
    unbroken = score_split(models, METHODS, articles, "reset", ReadingStore(tmp_path / "new"), 2)
    assert set(told) == {"metalm"}
    for one, other in zip(resumed.scores.articles, unbroken.scores.articles, strict=True):
        for name in resumed.scores.methods:
            np.testing.assert_array_equal(one.losses[name], other.losses[name])


def test_a_kept_reading_is_of_the_same_weights_and_settings(models, articles, tmp_path):
    store, told = ReadingStore(tmp_path), []

    def reads_again(**changes):
        told.clear()
        methods = (METHODS[0], METHODS[4].with_(**changes))
        score_split(models, methods, articles, "reset", store, 1, lambda *p: told.append(p[0]))
        return "metalm" in told

    assert reads_again()
    assert not reads_again()
    assert reads_again(settings=SCALES | {"rate_scale": 1.4})
    assert reads_again(segment=2)
    with torch.no_grad():
        models.models["joint"].decoder.bias[3] += 0.1
    assert reads_again()
    with torch.no_grad():
        next(models.rules["joint"].parameters()).add_(0.1)
    assert reads_again()
    assert not reads_again()


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_a_kept_reading_is_of_the_same_articles(models, article_set, tmp_path, mode):
    """The same tokens, cut elsewhere: other articles, but in the carry mode the same text."""
    tokens = np.random.default_rng(6).integers(0, 11, 20).astype(np.int32)
    store, told = ReadingStore(tmp_path / "kept"), []
    for number, cuts in enumerate(((5, 12), (6, 12), (12,))):
        told.clear()
        articles = article_set(np.split(tokens, cuts))
        found = score_split(
            models, METHODS, articles, mode, store, 2, lambda *p: told.append(p[0])
        ).scores
        new = ReadingStore(tmp_path / f"new {number}")
        fresh = score_split(models, METHODS, articles, mode, new, 2).scores
        assert bool(told) == (mode == "reset" or number == 0)
        for one, other in zip(found.articles, fresh.articles, strict=True):
            for name in found.methods:
                np.testing.assert_array_equal(one.losses[name], other.losses[name])


def trial(segment, perplexity, cached, **settings):
    cache = CacheConfig(theta=cached, share=0.1)
    return Trial(
        segment=segment,
        settings=settings,
        perplexity=perplexity,
        cached_perplexity=cached,
        cache=cache,
        seconds=1.0,
    )


def test_compared_methods_are_those_that_validation_chose():
    trials = {
        "none": [trial(64, 9.0, 8.0)],
        "rms": [trial(20, 7.0, 6.5, rate=1.0), trial(10, 6.0, 6.2, rate=2.0)],
        "joint": [trial(20, 5.5, 5.0, rate_scale=1.0), trial(10, 5.0, 5.2, rate_scale=2.0)],
    }
    methods = {method.name: method for method in compared_methods(trials)}
    assert next(iter(methods)) == "static"
    static, rms, joint = (methods[n] for n in ("static", "dynamic evaluation (RMS)", "metalm"))
    assert (static.learning, static.cache) == ("none", None)
    assert (rms.segment, rms.settings, rms.cache) == (10, {"rate": 2.0}, None)
    assert (joint.model, joint.segment, joint.settings) == ("joint", 10, {"rate_scale": 2.0})
    cached = methods["dynamic evaluation (RMS) + cache"]
    assert (cached.segment, cached.settings, cached.cache.theta) == (10, {"rate": 2.0}, 6.2)
    cached = methods["metalm + cache"]
    assert (cached.segment, cached.settings, cached.cache.theta) == (20, {"rate_scale": 1.0}, 5.0)
    assert methods["cache"].cache.theta == 8.0
    assert methods["metalm, not learning"].model == "joint"
    assert methods["metalm, segments of 20"].settings == {"rate_scale": 1.0}


def test_a_cache_shares_the_settings_that_are_as_good_without_one():
    trials = [trial(20, 7.0, 6.5, rate=1.0), trial(10, 6.0, 6.51, rate=2.0)]
    methods = {m.name: m for m in compared_methods({"none": [trial(64, 9.0, 8.0)], "rms": trials})}
    cached = methods["dynamic evaluation (RMS) + cache"]
    assert (cached.segment, cached.settings, cached.cache.theta) == (10, {"rate": 2.0}, 6.51)


def test_the_other_mode_says_where_the_search_begins(models, articles):
    config = TuningConfig(
        articles=1, tokens=4, segments=(4,), rule_segments=(3,), thetas=(1.0,), shares=(0.1,)
    )
    other = {"sgd": [trial(4, 5.0, 4.0, rate=0.25, decay=0.125), trial(4, 6.0, 4.0, rate=1.0)]}
    trials = tune_all(models, articles, config, "carry", other=other)
    assert trials["sgd"][0].settings == {"rate": 0.25, "decay": 0.125}


def test_tune_all_tries_what_is_there_and_not_known(models, articles):
    config = TuningConfig(
        articles=2, tokens=6, segments=(4,), rule_segments=(3,), thetas=(1.0,), shares=(0.1,)
    )
    known = {"none": [trial(64, 9.0, 8.0)]}
    reported, kept = [], []
    trials = tune_all(
        models,
        articles,
        config,
        "carry",
        known,
        report=lambda name, one: reported.append((name, one)),
        keep=lambda found: kept.append(list(found)),
    )
    assert list(trials) == ["none", "sgd", "rms", "joint"]
    assert trials["none"] is known["none"]
    assert reported == [(n, t) for n, found in trials.items() for t in found if n != "none"]
    assert kept == [["none", "sgd"], ["none", "sgd", "rms"], ["none", "sgd", "rms", "joint"]]
    assert all(math.isfinite(t.perplexity) for found in trials.values() for t in found)
