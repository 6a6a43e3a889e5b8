import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import CacheConfig, mixed_nats
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.methods import Method
from metalm.language.reading.mixing import mixture
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.run.scoring import score_split
from metalm.language.tuning.comparison import compared_methods, tune_all
from metalm.language.tuning.trials import Trial
from metalm.language.tuning.tuning_text import TuningConfig

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
    Method(
        name="metalm, two rates + cache",
        model="joint",
        learning="joint",
        segment=3,
        settings=SCALES,
        cache=CACHES[1],
        multiples=(1.0, 0.25),
    ),
)


def telling(told):
    """Writes down (who reads, tokens in all, tokens of a segment)."""
    return lambda name, total: lambda tokens, nats: told.append((name, total, tokens))


def expected_nats(models, method, texts):
    """Token losses of one method, without the code that shares readings."""
    if len(method.multiples) > 1:
        return expected_of_copies(models, method, texts)
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


def expected_of_copies(models, method, texts):
    """Every copy read by itself, at its own rate, and the last one's cache."""
    said = []
    for multiple in method.multiples:
        settings = {**SCALES, "rate_scale": SCALES["rate_scale"] * multiple}
        alone = method.with_(settings=settings, cache=None, multiples=(1.0,))
        said.append(expected_nats(models, alone, texts))
    cache = method.cache
    grid = CacheGrid(thetas=(cache.theta,), window=cache.window)
    reader = Reader(
        models.model(alone), models.rule(alone), models.fast_names(alone), alone.segment, grid
    )
    prior = [*[(1 - cache.share) / len(said)] * len(said), cache.share]
    return [
        mixture([*(-copy[number] for copy in said), found[0]], prior).nats
        for number, found in enumerate(reader.read(texts).cache)
    ]


@pytest.mark.parametrize(("mode", "rows"), [("reset", 1), ("reset", 2), ("carry", 1), ("carry", 5)])
def test_every_method_pays_for_every_word(models, articles, tmp_path, mode, rows):
    told, store = [], ReadingStore(tmp_path)
    scored = score_split(models, METHODS, articles, mode, store, rows, telling(told))
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
        assert scored.fallbacks[method.name] == 0
    # Methods that differ in their cache share a reading, and so do copies: four of all tokens.
    assert sum(tokens for _, _, tokens in told) == 4 * articles.num_tokens
    totals = {(name, total) for name, total, _ in told}
    assert sum(total for _, total in totals) == 4 * articles.num_tokens


def test_methods_cost_something_different(models, articles, tmp_path):
    scores = score_split(models, METHODS, articles, "reset", ReadingStore(tmp_path)).scores
    totals = [float(scores.nats(name).sum()) for name in scores.methods]
    assert len({round(total, 6) for total in totals}) == len(METHODS)


def test_a_stopped_evaluation_goes_on_with_what_it_has_read(models, articles, tmp_path):
    def stop(name, total):
        if name == "metalm":
            raise KeyboardInterrupt
        return lambda tokens, nats: None

    store, told = ReadingStore(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        score_split(models, METHODS, articles, "reset", store, 2, stop)
    resumed = score_split(models, METHODS, articles, "reset", store, 2, telling(told))
    unbroken = score_split(models, METHODS, articles, "reset", ReadingStore(tmp_path / "new"), 2)
    assert {name for name, *_ in told} == {"metalm", "metalm, two rates + cache"}
    for one, other in zip(resumed.scores.articles, unbroken.scores.articles, strict=True):
        for name in resumed.scores.methods:
            np.testing.assert_array_equal(one.losses[name], other.losses[name])


def test_a_kept_reading_is_of_the_same_weights_and_settings(models, articles, tmp_path):
    store, told = ReadingStore(tmp_path), []

    def reads_again(**changes):
        told.clear()
        methods = (METHODS[0], METHODS[4].with_(**changes))
        score_split(models, methods, articles, "reset", store, 1, telling(told))
        return "metalm" in {name for name, *_ in told}

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
        found = score_split(models, METHODS, articles, mode, store, 2, telling(told)).scores
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


def test_two_rates_are_compared_where_they_were_tried():
    two = {"multiples": (2.0, 0.5)}
    trials = {
        "none": [trial(64, 9.0, 8.0)],
        "rms": [trial(20, 7.0, 6.0, rate=1.0), replace(trial(20, 5.0, 4.0, rate=1.0), **two)],
        "joint": [
            trial(10, 6.0, 5.0, rate_scale=1.0),
            replace(trial(10, 4.0, 3.5, rate_scale=1.0), **two),
            replace(trial(10, 4.5, 3.0, rate_scale=1.0), multiples=(3.0, 1 / 3)),
        ],
    }
    methods = {method.name: method for method in compared_methods(trials)}
    assert methods["metalm"].multiples == (1.0,)
    assert methods["dynamic evaluation (RMS), two rates"].multiples == (2.0, 0.5)
    assert methods["dynamic evaluation (RMS), two rates + cache"].cache.theta == 4.0
    found = methods["metalm, two rates"]
    assert (found.multiples, found.cache) == ((2.0, 0.5), None)
    assert [copy.settings for copy in found.copies()] == [{"rate_scale": 2.0}, {"rate_scale": 0.5}]
    assert methods["metalm, two rates + cache"].multiples == (3.0, 1 / 3)
    for name in ("dynamic evaluation (RMS)", "metalm"):
        for end in ("", " + cache"):
            two, learned = (
                methods[name + way + end] for way in (", two rates", ", learned mixture")
            )
            assert (two.learned_mixture, learned.learned_mixture) == (False, True)
            assert learned.with_(name=two.name, learned_mixture=False) == two
    without = [method.name for method in compared_methods(trials, ablations=False)]
    assert {"metalm, two rates + cache", "dynamic evaluation (RMS), two rates"} <= {*without}
    one_model = [method.name for method in compared_methods(trials, one_model=True)]
    assert one_model == [name for name in methods if name != "metalm, not learning"]
    assert "metalm, not learning" in methods


def test_caches_with_a_learned_lambda_are_compared_where_that_is_asked():
    trials = {
        "none": [trial(64, 9.0, 8.0)],
        "sgd": [trial(20, 9.0, 6.0, rate=1.0)],
        "rms": [trial(20, 7.0, 6.5, rate=1.0)],
        "rule": [trial(20, 7.0, 6.5, rate_scale=1.0)],
        "joint": [trial(20, 5.5, 5.0, rate_scale=1.0), trial(10, 5.0, 5.2, rate_scale=2.0)],
    }
    plain = compared_methods(trials)
    methods = compared_methods(trials, learned_cache=True)
    assert [method for method in methods if method.name in {m.name for m in plain}] == plain
    added = {m.name: m for m in methods if m not in plain}
    assert [*added] == [
        "learned cache",
        "dynamic evaluation (RMS) + learned cache",
        "metalm + learned cache",
    ]
    fixed = {m.name: m for m in plain}
    for name, method in added.items():
        assert method.learned_mixture
        other = fixed[name.replace("learned ", "")]
        assert method.with_(name=other.name, learned_mixture=False) == other


def test_a_cache_without_a_share_is_not_learned():
    nothing = replace(trial(20, 7.0, 6.5, rate=1.0), cache=CacheConfig(share=0.0))
    trials = {"none": [trial(64, 9.0, 8.0)], "rms": [nothing]}
    names = [method.name for method in compared_methods(trials, learned_cache=True)]
    assert "learned cache" in names
    assert "dynamic evaluation (RMS) + learned cache" not in names


def test_a_reading_with_other_fast_weights_is_another_reading(models, articles, tmp_path):
    settings = {"rate": 0.2, "decay": 0.01}
    methods = [
        Method(name="static", model="control", learning="none", segment=64),
        Method(name="sgd", model="control", learning="sgd", segment=4, settings=settings),
    ]
    found = []
    for names in (models.rival_names, ("decoder.bias",), models.rival_names):
        own = replace(models, rival_names=names)
        scored = score_split(own, methods, articles, "reset", ReadingStore(tmp_path))
        found.append(scored.scores.nats("sgd"))
    assert abs(found[0] - found[1]).max() > 0.01
    np.testing.assert_array_equal(found[0], found[2])
    assert len(list(tmp_path.iterdir())) == 3


def test_copies_at_two_rates_are_tried_around_the_best_settings(models, articles):
    config = TuningConfig(
        articles=2,
        tokens=6,
        segments=(4,),
        rule_segments=(3,),
        thetas=(1.0,),
        shares=(0.1,),
        spreads=(2.0, 4.0),
    )
    settings = {"rate": 0.2, "decay": 0.01, "eps": 0.7}
    known = {
        "none": [trial(64, 9.0, 8.0)],
        "sgd": [trial(4, 9.0, 8.0, rate=0.1, decay=0.1)],
        "rms": [trial(4, 7.0, 6.0, **settings), trial(4, 8.0, 7.0, **settings | {"rate": 0.1})],
        "joint": [trial(3, 6.0, 5.0, **SCALES), trial(3, 7.0, 4.0, rate_scale=1.0, decay_scale=1)],
    }
    found = tune_all(models, articles, config, "reset", known)
    pairs = [(2.0, 0.5), (4.0, 0.25)]
    assert [t.multiples for t in found["rms"][2:]] == pairs
    assert all(t.settings == settings for t in found["rms"][2:])
    assert [t.multiples for t in found["joint"][2:]] == pairs * 2
    assert [t.settings["rate_scale"] for t in found["joint"][2:]] == [1.5, 1.5, 1.0, 1.0]
    text = [articles[index].tokens[:6] for index in (0, 2)]
    method = Method(
        name="", model="joint", learning="joint", segment=3, settings=SCALES, multiples=(2.0, 0.5)
    )
    nats = nats_of_copies(
        [
            Reader(models.model(copy), models.rule(copy), models.fast_names(copy), 3).read(text)
            for copy in method.copies()
        ]
    )
    words = sum(
        int(articles[index].words[len(t) - 1]) + 1 for index, t in zip((0, 2), text, strict=True)
    )
    expected = math.exp(sum(of_text.sum() for of_text in nats) / words)
    assert math.isclose(found["joint"][2].perplexity, expected, rel_tol=1e-9)
    again = tune_all(models, articles, config, "reset", found)
    assert again == found
    plain = tune_all(models, articles, config, "reset", known, ablations=False)
    assert [t.multiples for t in plain["rms"][2:]] == pairs
    assert len(plain["joint"]) == 6


def test_a_cache_shares_the_settings_that_are_as_good_without_one():
    trials = [trial(20, 7.0, 6.5, rate=1.0), trial(10, 6.0, 6.505, rate=2.0)]
    methods = {m.name: m for m in compared_methods({"none": [trial(64, 9.0, 8.0)], "rms": trials})}
    cached = methods["dynamic evaluation (RMS) + cache"]
    assert (cached.segment, cached.settings, cached.cache.theta) == (10, {"rate": 2.0}, 6.505)


@pytest.mark.parametrize(("cached", "expected"), [(6.0, True), (4.0, False)])
def test_plain_gradients_have_a_cache_only_if_that_is_the_best_rival(cached, expected):
    trials = {"sgd": [trial(5, 6.5, 5.0, rate=1.0)], "rms": [trial(5, 6.0, cached, rate=2.0)]}
    names = [method.name for method in compared_methods(trials)]
    assert "dynamic evaluation (SGD)" in names
    assert "dynamic evaluation (RMS) + cache" in names
    assert ("dynamic evaluation (SGD) + cache" in names) == expected


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


def test_unknown_words_are_counted(models, articles, tmp_path):
    """A word that holds the token of unknown words is one of them, whatever it was."""
    methods, store = METHODS[:1], ReadingStore(tmp_path)
    plain = score_split(models, methods, articles, "reset", store).scores
    token = int(articles[1].tokens[2])
    found = score_split(models, methods, articles, "reset", store, unknown=token).scores
    expected = 0
    for article, before, after in zip(articles, plain.articles, found.articles, strict=True):
        holds = {int(w) for w, t in zip(article.words, article.tokens, strict=True) if t == token}
        expected += len(holds)
        for place, (one, other) in enumerate(zip(before.words, after.words, strict=True)):
            assert other == ("<unk>" if place in holds else one)
    assert found.num_unknown == expected > 0
    assert found.perplexity("static") == plain.perplexity("static")
