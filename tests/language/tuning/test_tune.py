import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import CacheGrid, Reader, Readings
from metalm.language.tuning.settings_search import search
from metalm.language.tuning.trials import Trial, choose_settings, trial_from_json, trial_to_json
from metalm.language.tuning.tune import best_cache, try_methods, tune
from metalm.language.tuning.tuning_text import TuningConfig, tuning_text
from metalm.meta.rules.gradient_descent import GradientDescent
from metalm.meta.rules.learned_rates import LearnedRates

CONFIG = TuningConfig(
    articles=3,
    tokens=9,
    segments=(4, 2),
    rule_segments=(4, 3),
    thetas=(0.25, 0.5, 2.0),
    shares=(0.05, 0.2, 0.4),
    window=6,
    rows=2,
)
STEPS = {"rate": 2.0, "decay": 4.0}


def trial(perplexity, segment=4, cached=0.0, **settings):
    return Trial(
        segment=segment,
        settings=settings,
        perplexity=perplexity,
        cached_perplexity=cached,
        cache=CacheConfig(),
        seconds=0.5,
    )


def each(evaluate):
    """One reading for each of several settings."""
    return lambda several: [evaluate(settings) for settings in several]


@pytest.mark.parametrize("where", [(0.31, 0.02), (9.0, 7e-4), (0.004, 1.7)])
def test_search_finds_the_minimum_of_a_separable_function(where):
    """Of the grid of half steps around the start, every point of which is tried here."""

    def cost(rate, decay):
        return 9 + math.log(rate / where[0]) ** 2 + 3 * math.log(decay / where[1]) ** 2

    tried = []

    def evaluate(settings):
        tried.append(settings)
        return trial(cost(**settings), **settings)

    start = {"rate": 0.5, "decay": 1e-3}
    trials = search(each(evaluate), start, STEPS)
    assert [t.settings for t in trials] == tried
    assert len({tuple(sorted(settings.items())) for settings in tried}) == len(tried)
    assert tried[0] == start
    grid = itertools.product(
        (0.5 * 2 ** (half / 2) for half in range(-20, 21)),
        (1e-3 * 4 ** (half / 2) for half in range(-20, 21)),
    )
    assert math.isclose(
        min(t.perplexity for t in trials), min(cost(*p) for p in grid), rel_tol=1e-3
    )


def test_looking_ahead_walks_the_same_way_in_fewer_calls():
    def cost(rate, decay):
        return 9 + math.log(rate / 0.31) ** 2 + 3 * math.log(decay / 0.02) ** 2

    calls = {False: [], True: []}

    def walk(ahead):
        def evaluate(several):
            calls[ahead].append(len(several))
            return [trial(cost(**settings), **settings) for settings in several]

        return search(evaluate, {"rate": 0.5, "decay": 1e-3}, STEPS, ahead=ahead)

    plain, looked = walk(False), walk(True)
    assert {tuple(t.settings.items()) for t in plain} <= {tuple(t.settings.items()) for t in looked}
    assert choose_settings(plain, cached=False) == choose_settings(looked, cached=False)
    assert set(calls[False]) == {1}
    assert calls[True][0] == 5  # the start and two steps of either setting
    assert len(calls[True]) < len(calls[False])


def test_another_walk_with_another_goal_goes_on_from_what_is_known():
    """With a cache lower rates win: the walk for that ends there, and repeats no trial."""

    def costs(rate, decay):
        distance = math.log(decay / 0.02) ** 2
        return [9 + math.log(rate / best) ** 2 + distance for best in (0.31, 0.04)]

    def evaluate(several):
        found = [costs(**settings) for settings in several]
        return [
            trial(alone, cached=cached, **settings)
            for settings, (alone, cached) in zip(several, found, strict=True)
        ]

    known = search(evaluate, {"rate": 0.5, "decay": 1e-3}, STEPS)
    start = choose_settings(known, cached=True).settings
    half = {name: step**0.5 for name, step in STEPS.items()}
    new = search(evaluate, start, half, halvings=0, known=known, goal=lambda t: t.cached_perplexity)
    seen = [tuple(t.settings.items()) for t in [*known, *new]]
    assert len(set(seen)) == len(seen)
    found = choose_settings([*known, *new], cached=True)
    grid = itertools.product(
        (0.5 * 2 ** (half / 2) for half in range(-20, 21)),
        (1e-3 * 4 ** (half / 2) for half in range(-20, 21)),
    )
    assert math.isclose(found.cached_perplexity, min(costs(*p)[1] for p in grid), rel_tol=1e-3)
    assert found.cached_perplexity < choose_settings(known, cached=True).cached_perplexity


def test_search_without_halving_stays_on_whole_steps():
    trials = search(
        each(lambda s: trial(abs(s["rate"] - 5.0), **s)), {"rate": 1.0}, STEPS, halvings=0
    )
    assert {t.settings["rate"] for t in trials} <= {2.0**n for n in range(-2, 6)}
    assert choose_settings(trials, cached=False).settings == {"rate": 4.0}


def test_search_survives_settings_that_blow_up():
    def evaluate(settings):
        return trial(math.inf if settings["rate"] > 3 else 1 / settings["rate"], **settings)

    assert choose_settings(search(each(evaluate), {"rate": 1.0}, STEPS), cached=False).settings == {
        "rate": pytest.approx(2 * math.sqrt(2), rel=1e-5)
    }


def test_search_ends_where_steps_no_longer_matter():
    """A fall of one in ten thousand at every step is not worth a step."""
    trials = search(each(lambda s: trial(5.0 * s["rate"] ** -1e-4, **s)), {"rate": 1.0}, STEPS)
    assert {t.settings["rate"] for t in trials} <= {0.5, 2.0, 0.707107, 1.0, 1.41421}


def test_choose_settings():
    trials = [
        trial(5.0, 4, 3.0, rate=1.0),
        trial(4.0, 2, 3.5, rate=2.0),
        trial(6.0, 2, 2.0, rate=3),
    ]
    assert choose_settings(trials, cached=False) is trials[1]
    assert choose_settings(trials, cached=True) is trials[2]
    assert choose_settings(trials, cached=False, segment=4) is trials[0]


def test_no_trial_to_choose_from():
    trials = [trial(5.0, 4, 3.0, rate=1.0)]
    with pytest.raises(ValueError, match="expected one of 2 fast copies, found none among 1; tune"):
        choose_settings(trials, cached=False, copies=2)
    with pytest.raises(ValueError, match="at segments of 3, found none"):
        choose_settings(trials, cached=False, segment=3)


def test_best_cache_equals_brute_force():
    random = np.random.default_rng(1)
    nats = [random.gamma(2.0, 1.0, length) for length in (5, 8)]
    found = [np.log(random.uniform(0, 0.9, (3, length))) for length in (5, 8)]
    found[0][:, 0] = np.nan
    found[1][1, 3] = -np.inf
    totals = {}
    for number, theta in enumerate(CONFIG.thetas):
        for share in CONFIG.shares:
            total = 0.0
            for costs, caches in zip(nats, found, strict=True):
                for cost, cache in zip(costs, caches[number], strict=True):
                    mixed = (1 - share) * math.exp(-cost) + share * math.exp(cache)
                    total += cost if math.isnan(cache) else -math.log(mixed)
            totals[theta, share] = total
    best = min(totals, key=totals.get)
    config, total = best_cache([Readings(nats, found)], CONFIG)
    assert (config.theta, config.share, config.window) == (*best, 6)
    assert math.isclose(total, totals[best], rel_tol=1e-9)


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(3)
    return article_set([random.integers(0, 11, n).astype(np.int32) for n in (7, 12, 5, 14, 9)])


def test_tuning_text_is_spread_over_the_articles(articles):
    text = tuning_text(articles, CONFIG, "reset")
    assert text.num_words == 7 + 5 + 9
    for found, index in zip(text.texts, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(found, articles[index].tokens[:9])
    carried = tuning_text(articles, CONFIG, "carry")
    np.testing.assert_array_equal(np.concatenate(text.texts), *carried.texts)
    assert carried.num_words == text.num_words
    config = replace(CONFIG, carry_tokens=4)
    (shorter,) = tuning_text(articles, config, "carry").texts
    starts = [text[:4] for text in text.texts]
    np.testing.assert_array_equal(shorter, np.concatenate(starts))
    assert tuning_text(articles, config, "reset").num_words == text.num_words
    many = TuningConfig(articles=50, tokens=3)
    assert [len(t) for t in tuning_text(articles, many, "reset").texts] == [3] * 5


def test_what_stands_before_a_title_is_what_stands_there_in_the_whole_text(article_set):
    """Rows that are cut end as their articles do; reset, where nothing follows, they are cut."""
    long, short, other = (np.arange(n, dtype=np.int32) % 11 for n in (40, 12, 33))
    articles = article_set([long, short, other])
    config = TuningConfig(articles=3, tokens=16)
    (carried,) = tuning_text(articles, config, "carry").texts
    expected = [*long[:8], *long[-8:], *short, *other[:8], *other[-8:]]
    assert carried.tolist() == expected
    assert [len(t) for t in tuning_text(articles, config, "reset").texts] == [16, 12, 16]
    assert tuning_text(articles, config, "carry").num_words == len(expected)  # a word a token here


@pytest.fixture
def models(tiny_model, statistics):
    model = tiny_model()
    rms = statistics(model)
    rule = LearnedRates({"decoder.bias": rms["decoder.bias"]}, rate=0.3).requires_grad_(False)
    return TrainedModels(
        models={"control": model, "joint": tiny_model(seed=1)},
        rules={"rule": rule, "joint": rule},
        rival_names=tuple(rms),
        statistics={4: rms, 2: rms},
    )


def test_a_trial_is_a_reading_of_the_tuning_text(models, articles):
    text = tuning_text(articles, CONFIG, "reset")
    settings = {"rate": 0.4, "decay": 0.01}
    method = Method(name="", model="control", learning="sgd", segment=4, settings=settings)
    found = try_methods(models, [method], text, CONFIG)[0]
    model = models.models["control"]
    grid = CacheGrid(thetas=CONFIG.thetas, window=6)
    rule = GradientDescent(0.4, 0.01)
    readings = Reader(model, rule, models.rival_names, 4, grid).read(text.texts)
    assert math.isclose(found.perplexity, math.exp(readings.total / 21), rel_tol=1e-9)
    cache, nats = best_cache([readings], CONFIG)
    assert found.cache == cache
    assert math.isclose(found.cached_perplexity, math.exp(nats / 21), rel_tol=1e-9)


@pytest.mark.parametrize(
    ("learning", "model", "segments"),
    [
        ("none", "control", {64}),
        ("sgd", "control", {4, 2}),
        ("rms", "control", {4, 2}),
        ("rule", "control", {4, 3}),
        ("joint", "joint", {4, 3}),
    ],
)
def test_tune_tries_every_segment_length_and_reports_each_trial(
    models, articles, learning, model, segments
):
    reported = []
    text = tuning_text(articles, CONFIG, "reset")
    trials = tune(models, learning, model, text, CONFIG, reported.append)
    assert trials == reported
    assert {t.segment for t in trials} == segments
    best = choose_settings(trials, cached=False)
    method = Method(
        name="", model=model, learning=learning, segment=best.segment, settings=best.settings
    )
    again = try_methods(models, [method], text, CONFIG)[0]
    assert math.isclose(again.perplexity, best.perplexity, rel_tol=1e-12)
    if learning == "sgd":
        before = [t.segment for t in trials].index(2)
        longest = choose_settings(trials[:before], cached=False, segment=4).settings
        shorter = [t.settings for t in trials if t.segment == 2]
        walked = [s for s in shorter if s["decay"] == pytest.approx(longest["decay"] / 2, rel=1e-5)]
        assert shorter[0] == walked[0]
        assert shorter[0]["rate"] == pytest.approx(longest["rate"] / 2, rel=1e-5)
        assert len({settings["rate"] for settings in walked}) >= 3


@pytest.mark.parametrize(("learning", "model"), [("sgd", "control"), ("joint", "joint")])
def test_rivals_and_metalm_walk_once_more_with_a_surprise(models, articles, learning, model):
    text = tuning_text(articles, CONFIG, "reset")
    plain = tune(models, learning, model, text, CONFIG)
    trials = tune(models, learning, model, text, replace(CONFIG, surprise=0.5))
    more = trials[len(plain) :]
    assert [t.settings for t in trials[: len(plain)]] == [t.settings for t in plain]
    assert not any("surprise" in t.settings for t in plain)
    for cached in (False, True):
        best = choose_settings(plain, cached=cached)
        begun = {**best.settings, "surprise": 0.5}
        assert [t for t in more if t.segment == best.segment and t.settings == begun]
    assert {name for t in more for name in t.settings} == {*plain[0].settings, "surprise"}
    assert len({t.settings["surprise"] for t in more}) > 1
    best = choose_settings(more, cached=False)
    method = Method(
        name="", model=model, learning=learning, segment=best.segment, settings=best.settings
    )
    reader = Reader(
        models.model(method),
        models.rule(method),
        models.fast_names(method),
        best.segment,
        surprise=best.settings["surprise"],
    )
    total = reader.read(text.texts).total
    assert best.perplexity == pytest.approx(math.exp(total / text.num_words), rel=1e-9)


def test_a_rule_that_was_trained_with_a_surprise_begins_with_it(models, articles):
    text = tuning_text(articles, CONFIG, "reset")
    trained = replace(models, surprises={"rule": 0.0, "joint": 0.3})
    assert "surprise" not in tune(trained, "rule", "control", text, CONFIG)[0].settings
    first, *others = tune(trained, "joint", "joint", text, CONFIG)
    assert first.settings == {"rate_scale": 1.0, "decay_scale": 1.0, "surprise": 0.3}
    assert {t.settings["surprise"] for t in others} > {0.3}


def test_rms_settings_are_in_units_of_the_mean(models, statistics):
    settings = {"rate": 0.1, "decay": 0.0, "eps": 0.5}
    method = Method(name="", model="control", learning="rms", segment=2, settings=settings)
    rms = models.statistics[2]
    mean = float(torch.stack([tensor.mean() for tensor in rms.values()]).mean())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in rms.items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in rms.items()}
    found, _ = models.rule(method)(zeros, ones, zeros, None)
    for name, tensor in rms.items():
        torch.testing.assert_close(found[name], -0.1 / (tensor + 0.5 * mean))


def test_trials_survive_json():
    before = trial(3.25, 2, 3.0, rate=0.5, decay=1e-3)
    assert trial_from_json(trial_to_json(before)) == before
    two = replace(before, multiples=(2.0, 0.5))
    assert trial_from_json(trial_to_json(two)) == two
    older = trial_to_json(before)
    del older["multiples"]
    assert trial_from_json(older) == before
