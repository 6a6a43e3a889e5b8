import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from metalm.language.network.segment_loss import tempered_nats
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.method_readings import MethodReadings, read_methods
from metalm.language.reading.methods import Method
from metalm.language.reading.reader import Reader, Readings
from metalm.language.reading.store import ReadingStore
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import score_split
from metalm.language.run.temperatures import Temperatures, best_temperature, run_temperatures
from metalm.language.tuning.tuning_text import TuningConfig

of_both_cells = pytest.mark.parametrize("cell", ["lstm", "qrnn"])
GRID = (0.5, 1.0, 1.3, 2.0)
CONFIG = TuningConfig(articles=2, tokens=6, rows=2)
SCALES = {"rate_scale": 1.5, "decay_scale": 2.0}
STATIC = Method(name="static", model="control", learning="none", segment=5)
CACHE = CacheConfig(theta=0.5, share=0.3, window=6)
METHODS = (
    STATIC,
    STATIC.with_(name="cache", cache=CACHE),
    Method(
        name="sgd", model="control", learning="sgd", segment=4, settings={"rate": 0.3, "decay": 0.1}
    ),
    Method(
        name="two + cache",
        model="joint",
        learning="joint",
        segment=3,
        settings=SCALES,
        cache=CACHE,
        multiples=(1.0, 0.25),
    ),
    Method(
        name="learned",
        model="joint",
        learning="joint",
        segment=3,
        settings=SCALES,
        multiples=(1.0, 0.25),
        learned_mixture=True,
    ),
)


def test_losses_under_temperatures():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(0, 5, (3, 2), generator=generator)
    logits[1, 0, 2] = math.inf
    found = tempered_nats(logits, targets, GRID)
    assert found.shape == (4, 3, 2)
    for place, temperature in enumerate(GRID):
        for time in range(3):
            for row in range(2):
                powers = [math.exp(float(x) / temperature) for x in logits[time, row]]
                share = powers[int(targets[time, row])] / sum(powers)
                expected = math.log(5) if (time, row) == (1, 0) else -math.log(share)
                assert float(found[place, time, row]) == pytest.approx(expected, rel=1e-12)


@of_both_cells
@pytest.mark.parametrize("kind", ["static", "gradient descent", "learned rates"])
def test_what_is_learnt_does_not_depend_on_the_temperatures(tiny_model, texts, learning, kind):
    """To the bit; and temperature 1 is what was there before."""
    model = tiny_model()
    rule, _ = learning(kind, model)
    names = [name for name, _ in model.named_parameters()]
    plain = Reader(model, rule, names, 4).read(texts, 2)
    scored = Reader(model, rule, names, 4, temperatures=GRID).read(texts, 2)
    assert not plain.tempered
    for before, after, tempered in zip(plain.nats, scored.nats, scored.tempered, strict=True):
        np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(after, tempered[1])
        assert not np.isnan(tempered).any()
        assert len({tuple(row) for row in tempered}) == len(GRID)


@of_both_cells
def test_an_article_under_temperatures_token_by_token(
    tiny_model, texts, learning, plain_forward, plain_state, plain_nats
):
    """Score under every temperature, take the gradient at temperature 1, update, go on."""
    model, text = tiny_model(), texts[2]
    rule, update = learning("gradient descent", model)
    slow = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found = Reader(model, rule, list(slow), 4, temperatures=GRID).read([text])
    weights, state, inputs, expected = dict(slow), plain_state(model), [0, *text[:-1]], []
    for start in range(0, len(text), 4):
        part = slice(start, start + 4)
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        logits, _, _ = plain_forward(leaves, inputs[part], state)
        for target, of_token in zip(text[part], logits.detach(), strict=True):
            expected.append([-(of_token / t).log_softmax(-1)[target].item() for t in GRID])
        costs, _, after = plain_nats(leaves, inputs[part], text[part], state)
        gradients = torch.autograd.grad(costs.sum() / 4, list(leaves.values()))
        for name, gradient in zip(slow, gradients, strict=True):
            weights[name] = update(name, weights[name], gradient, slow[name])
        state = [(hidden.detach(), cell.detach()) for hidden, cell in after]
    np.testing.assert_allclose(found.tempered[0], np.array(expected).T, rtol=1e-8)


def reading(seed, lengths=(30, 50)):
    """Losses that no model gave, under every temperature, and a cache of two flatnesses."""
    random = np.random.default_rng(seed)
    return Readings(
        nats=[np.full(n, np.nan) for n in lengths],
        cache=[-random.gamma(2.0, 2.0, (2, n)) for n in lengths],
        tempered=[random.gamma(2.0, 1.5, (len(GRID), n)) for n in lengths],
    )


def test_the_best_temperature_of_one_copy():
    for seed in range(6):
        read = reading(seed)
        totals = [sum(text[place].sum() for text in read.tempered) for place in range(len(GRID))]
        found = best_temperature(MethodReadings([read], None, 0.0), GRID)
        assert found == GRID[int(np.argmin(totals))]


def test_the_best_temperature_beside_a_cache():
    """Of what is mixed: the model's share changes with the temperature, the cache's does not."""
    differs = False
    for seed in range(8):
        read = reading(seed)
        totals, alone = [], []
        for place in range(len(GRID)):
            mixed = [
                -np.log(0.7 * np.exp(-own[place]) + 0.3 * np.exp(cache[1]))
                for own, cache in zip(read.tempered, read.cache, strict=True)
            ]
            totals.append(sum(text.sum() for text in mixed))
            alone.append(sum(text[place].sum() for text in read.tempered))
        found = best_temperature(MethodReadings([read], 1, 0.3), GRID)
        assert found == GRID[int(np.argmin(totals))]
        differs |= int(np.argmin(totals)) != int(np.argmin(alone))
    assert differs


@pytest.fixture
def folder(tmp_path):
    folder = LanguageRunFolder(tmp_path / "run")
    folder.folder.mkdir()
    return folder


def test_temperatures_are_kept_and_used_again(models, articles, folder, monkeypatch):
    told = []
    say = lambda name, temperature: told.append((name, temperature))  # noqa: E731
    arguments = (articles, CONFIG, GRID, "reset", folder)
    found = run_temperatures(models, METHODS, *arguments, say)
    assert found.grid == GRID
    assert list(found.chosen) == ["static", "cache", "sgd", "two + cache"]
    assert told == list(found.chosen.items())
    with monkeypatch.context() as patched:
        patched.setattr("metalm.language.run.temperatures.read_methods", None)  # nothing is read
        assert run_temperatures(models, METHODS, *arguments, say) == found
    changed = [METHODS[0], METHODS[2].with_(settings={"rate": 0.2, "decay": 0.1})]
    run_temperatures(models, changed, *arguments, say)
    run_temperatures(models, changed, articles, CONFIG, GRID[:2], "reset", folder, say)
    assert len(told) == 4 + 2 + 2
    model = copy.deepcopy(models.models["control"])
    with torch.no_grad():
        model.decoder.bias[0] += 1.0
    others = dataclasses.replace(models, models={**models.models, "control": model})
    run_temperatures(others, changed, articles, CONFIG, GRID[:2], "reset", folder, say)
    assert len(told) == 4 + 2 + 2 + 2


def test_the_choice_is_made_on_the_tuning_text(models, articles, folder):
    """By brute force: the method is read anew, and every token of the text is summed."""
    found = run_temperatures(models, METHODS[2:3], articles, CONFIG, GRID, "carry", folder)
    text = np.concatenate([articles[index].tokens[:6] for index in (0, 2)])
    method = METHODS[2]
    reader = Reader(
        models.model(method),
        models.rule(method),
        models.fast_names(method),
        method.segment,
        temperatures=GRID,
    )
    totals = reader.read([text]).tempered[0].sum(1)
    assert found.chosen == {"sgd": GRID[int(np.argmin(totals))]}


def test_no_temperatures_cost_nothing(articles, folder):
    found = run_temperatures(None, METHODS, articles, CONFIG, (), "reset", folder)
    assert found == ((), {})
    assert list(folder.folder.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"chosen": 3}',
        '{"grid": [1.0], "chosen": {"static": 3}}',
        '{"chosen": {"static": "high"}}',
    ],
)
def test_a_damaged_file_is_named(models, articles, folder, text):
    (folder.folder / "temperatures-reset.json").write_text(text)
    with pytest.raises(ValueError, match=r"temperatures-reset\.json cannot be read; .*delete it"):
        run_temperatures(models, METHODS, articles, CONFIG, GRID, "reset", folder)


@pytest.mark.parametrize(("mode", "rows"), [("reset", 2), ("carry", 5)])
def test_methods_are_scored_once_more(models, articles, tmp_path, mode, rows):
    """The chosen temperature's losses, word by word; the main scores are what they were."""
    store, methods = ReadingStore(tmp_path / "with"), METHODS[:4]
    chosen = {"static": 2.0, "cache": 0.5, "sgd": 1.0, "two + cache": 1.3}
    told = []

    def tell(name, total):
        told.append(total)
        return lambda tokens, nats: None

    warm = Temperatures(GRID, chosen)
    scored = score_split(models, methods, articles, mode, store, rows, tell, temperatures=warm)
    bare = score_split(models, methods, articles, mode, ReadingStore(tmp_path / "bare"), rows)
    assert bare.tempered is None
    texts = [article.tokens for article in articles]
    whole = [np.concatenate(texts)] if mode == "carry" else texts
    for method in methods:
        (read,) = read_methods(models, [method], whole, rows, temperatures=GRID)
        place = GRID.index(chosen[method.name])
        nats = [copy.tempered for copy in read.copies]
        expected = by_hand(nats, read, place, method)
        words = np.concatenate([a.losses[method.name] for a in scored.tempered.scores.articles])
        assert words.sum() == pytest.approx(sum(text.sum() for text in expected), rel=1e-9)
        own = np.concatenate([a.losses[method.name] for a in scored.scores.articles])
        same = np.concatenate([a.losses[method.name] for a in bare.scores.articles])
        np.testing.assert_allclose(own, same, rtol=1e-12)
        if chosen[method.name] == 1.0:
            np.testing.assert_array_equal(own, words)
        else:
            assert abs(own - words).max() > 1e-3
    assert scored.tempered.temperatures == chosen
    told.clear()
    again = score_split(models, methods, articles, mode, store, rows, tell, temperatures=warm)
    assert told == []
    for name in chosen:
        np.testing.assert_array_equal(
            again.tempered.scores.nats(name), scored.tempered.scores.nats(name)
        )


def by_hand(nats, read, place, method):
    """Losses of a method at one temperature: alone, with a cache, or a mixture that learns."""
    if len(nats) == 1 and method.cache is None:
        return [text[place] for text in nats[0]]
    caches = [text[read.theta] for text in read.copies[-1].cache]
    mixed = []
    for number, cache in enumerate(caches):
        said = [np.exp(-copy[number][place]) for copy in nats] + [np.exp(cache)]
        prior = [*[0.7 / len(nats)] * len(nats), 0.3]
        weights, costs = np.log(prior), []
        for time in range(len(cache)):
            known = [k for k in range(len(said)) if not math.isnan(said[k][time])]
            share = np.exp(weights[known]) / np.exp(weights[known]).sum()
            total = sum(w * said[k][time] for w, k in zip(share, known, strict=True))
            costs.append(-math.log(total))
            if len(nats) > 1:
                for w, k in zip(share, known, strict=True):
                    weights[k] += 0.1 * (w * said[k][time] / total - w)
        mixed.append(np.array(costs))
    return mixed


def test_a_kept_reading_without_temperatures_is_not_taken_for_one_with(models, articles, tmp_path):
    store = ReadingStore(tmp_path)
    score_split(models, METHODS[:1], articles, "reset", store)
    told = []

    def tell(name, total):
        told.append(name)
        return lambda tokens, nats: None

    score_split(models, METHODS[:1], articles, "reset", store, progress=tell)
    assert told == []
    warm = Temperatures(GRID, {"static": 2.0})
    score_split(models, METHODS[:1], articles, "reset", store, progress=tell, temperatures=warm)
    assert told == ["static"]
