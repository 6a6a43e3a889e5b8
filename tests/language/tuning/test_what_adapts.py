"""Choices of fast weights by their names and sizes, and the benchmark that compares them."""

import argparse
import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.methods import STARTS
from metalm.language.reading.reader import Reader
from metalm.language.run.opened_run import OpenedRun
from metalm.language.run.trained import load_model
from metalm.language.text.streams import TokenStreams
from metalm.language.tuning.choice_scores import compared_text, starting_settings
from metalm.language.tuning.fast_choices import WHOLE, FastChoice, fast_rms, low_rank_choices
from metalm.language.tuning.trials import Trial

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def program():
    path = ROOT / "benchmarks/what_adapts.py"
    spec = importlib.util.spec_from_file_location("what_adapts_program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Numbers in the tensors of the tiny model: vocabulary 11, embedding 3, hidden 5, two layers.
EMBEDDING, DECODER_BIAS = 11 * 3, 11
INPUT, RECURRENT, BIASES = 20 * 3 + 12 * 5, 20 * 5 + 12 * 3, 2 * (20 + 12)


def test_whole_choices_take_what_they_say(tiny_model):
    model = tiny_model(dtype=torch.float32)
    sizes = {choice.name: choice.of(model) for choice in WHOLE}
    expected = {
        "embedding and output bias": EMBEDDING + DECODER_BIAS,
        "recurrent layers": INPUT + RECURRENT + BIASES,
        "all but recurrent weights": EMBEDDING + DECODER_BIAS + INPUT + BIASES,
        "everything": EMBEDDING + DECODER_BIAS + INPUT + RECURRENT + BIASES,
    }
    assert {name: fast.bytes_kept for name, fast in sizes.items()} == {
        name: 4 * count for name, count in expected.items()
    }
    for fast in sizes.values():
        assert fast.model is model
        assert fast.bytes_at_work == 2 * fast.bytes_kept
    assert set(sizes["embedding and output bias"].names) == {"embedding.weight", "decoder.bias"}
    assert not any("hidden_weight" in name for name in sizes["all but recurrent weights"].names)


def test_low_rank_choices_take_factors_and_vectors(tiny_model):
    model = tiny_model()
    choices = low_rank_choices([1, 2], ["random", "principal"])
    assert [choice.name for choice in choices[:2]] == [
        "rank 1, random basis",
        "rank 1, principal basis",
    ]
    for choice in choices:
        fast = choice.of(model)
        own = dict(fast.model.named_parameters())
        factors = choice.rank * ((11 + 3) + (20 + 3) + (12 + 5))
        count = factors + DECODER_BIAS + BIASES
        assert fast.bytes_kept == 8 * count == sum(8 * own[name].numel() for name in fast.names)
        assert fast.bytes_at_work == 2 * fast.bytes_kept + 2 * 8 * (EMBEDDING + INPUT)
        text = [np.arange(7, dtype=np.int32)]
        same = Reader(fast.model).read(text).nats[0]
        np.testing.assert_allclose(same, Reader(model).read(text).nats[0], rtol=1e-12)
    (alone,) = low_rank_choices([2], ["random"], ["left"])
    assert alone.name == "rank 2, random basis, U alone"
    assert alone.of(model).bytes_kept == 8 * (2 * (11 + 20 + 12) + DECODER_BIAS + BIASES)
    with pytest.raises(ValueError, match="impossible rank for"):
        FastChoice(name="", rank=4).of(model)


def test_the_rms_of_factors_is_that_of_the_gradients_in_the_basis(tiny_model, article_set):
    """U's gradient is that of the weight times V'; V, which has none, takes the mean of its U."""
    random = np.random.default_rng(3)
    articles = article_set([random.integers(0, 11, 40).astype(np.int32)])
    model = tiny_model()
    fast = FastChoice(name="", rank=2, patterns=("layers.0.input_weight", "decoder.bias")).of(model)
    found = fast_rms(fast, articles, 5, 1)
    streams = TokenStreams(articles, 2, 0, 0)
    inputs, targets = streams.segment(0, 5)
    output = model.requires_grad_(True)(inputs, model.initial_state(2)).logits
    loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
    weight, bias = model.layers[0].input_weight, model.decoder.bias
    to_weight, to_bias = torch.autograd.grad(loss, [weight, bias])
    key = "factors.layers/0/input_weight"
    right = fast.model.get_parameter(f"{key}.right").detach()
    left = (to_weight @ right.T).abs()
    torch.testing.assert_close(found[f"{key}.left"], left)
    torch.testing.assert_close(found["module.decoder.bias"], to_bias.abs())
    torch.testing.assert_close(found[f"{key}.right"], left.mean().expand(2, 3))


@pytest.fixture(scope="module")
def measured(program, trained_run, tmp_path_factory):
    """Options, and all scores for one tuned and two shown articles."""
    run = OpenedRun(trained_run[2], *trained_run[:2])
    out = tmp_path_factory.mktemp("what-adapts")
    words = ["run", "--out", str(out), "--articles", "2", "--tuning-articles", "1"]
    words += ["--tokens", "11", "--segment", "4", "--ranks", "2", "--bases", "principal"]
    words += ["--factors", "both", "left"]
    options = program.parse([*words, "--halvings", "0", "--batches", "3", "--rows", "2"])
    return options, program.measure(run, options)


def test_the_scores(measured, trained_run, plain_read):
    config, corpus, folder = trained_run
    options, scores = measured
    names = [choice.name for choice in WHOLE] + ["rank 2, principal basis"]
    names += ["rank 2, principal basis, U alone"]
    assert [(score.choice, score.learning) for score in scores] == [
        ("nothing", "none"),
        *((name, learning) for name in names for learning in ("sgd", "rms")),
    ]
    stored = json.loads((Path(options.out) / "what-adapts.json").read_text())["scores"]
    assert stored == [dataclasses.asdict(score) for score in scores]
    for score in scores[1:]:
        assert math.isfinite(score.perplexity)
        tried = [trial["settings"] for trial in score.trials]
        rates = {trial["settings"]["rate"]: trial["perplexity"] for trial in score.trials}
        assert rates[score.settings["rate"]] == min(rates.values())
        assert score.settings in tried
        start = STARTS[score.learning]
        assert tried[0]["rate"] == pytest.approx(start["rate"] / 5, rel=1e-5)
        assert {settings["decay"] for settings in tried} == {start["decay"] / 5}
        assert len({round(math.log2(rate / tried[0]["rate"]), 3) for rate in rates}) >= 3
    model = load_model(folder, "control", config)
    shown = [corpus.valid[index] for index in (1, 2)]
    static = scores[0]
    assert static.words == [article.words[10] + 1 for article in shown]
    by_hand = [plain_read(model, article.tokens[:11], 4)[0].sum() for article in shown]
    assert static.nats == pytest.approx(by_hand, rel=1e-4)
    assert static.perplexity == pytest.approx(np.exp(sum(by_hand) / sum(static.words)), rel=1e-4)
    for score in scores[1:]:
        if score.learning != "sgd" or score.choice.startswith("rank"):
            continue
        (choice,) = (choice for choice in WHOLE if choice.name == score.choice)
        rate, decay = score.settings["rate"], score.settings["decay"]

        def update(name, weight, gradient, slow, rate=rate, decay=decay):
            return weight - rate * gradient + decay * (slow - weight)

        fast = choice.of(model).names
        by_hand = [
            plain_read(model, article.tokens[:11], 4, update, fast)[0].sum() for article in shown
        ]
        assert score.nats == pytest.approx(by_hand, rel=1e-4)
        tuned = plain_read(model, corpus.valid[0].tokens[:11], 4, update, fast)[0]
        words = corpus.valid[0].words[10] + 1
        lowest = min(trial["perplexity"] for trial in score.trials)
        assert lowest == pytest.approx(np.exp(tuned.sum() / words), rel=1e-4)


def test_the_table(program, measured):
    _, scores = measured
    lines = program.table(scores).splitlines()
    assert len(lines) == 2 + len(scores)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    default = next(line for line in cells if line[0] == "all but recurrent weights")
    assert default[1] == "SGD"
    assert default[4] == "1.000"
    static, sgd = scores[0], scores[cells.index(default)]
    assert cells[0][4] == f"{static.perplexity / sgd.perplexity:.3f}"
    assert [float(line[3]) for line in cells] == [round(s.perplexity, 2) for s in scores]
    assert [line[5] for line in cells] == [f"{s.bytes_kept / 1e6:.3f} MB" for s in scores]


def test_what_is_there_is_not_read_again(program, measured, trained_run, monkeypatch):
    run = OpenedRun(trained_run[2], *trained_run[:2])
    options, scores = measured

    def refuse(*arguments):
        raise AssertionError("read again")

    monkeypatch.setattr(Reader, "read", refuse)
    assert program.measure(run, options) == scores
    other = argparse.Namespace(**{**vars(options), "tokens": 10})
    with pytest.raises(AssertionError, match="read again"):
        program.measure(run, other)


def test_nothing_left_to_show(trained_run):
    _, corpus, _ = trained_run
    with pytest.raises(ValueError, match="expected more than 3 validation articles, found 3"):
        compared_text(corpus.valid, num_tuned=3, num_shown=1, tokens=5)


def test_settings_begin_where_tuning_ended():
    """Without trials of that segment length: in shorter segments rate and decay shrink."""
    assert starting_settings([], "rms", 5) == {
        "rate": STARTS["rms"]["rate"] / 4,
        "decay": STARTS["rms"]["decay"] / 4,
        "eps": STARTS["rms"]["eps"],
    }
    trials = [
        Trial(
            segment=segment,
            settings={"rate": rate, "decay": 0.0},
            perplexity=perplexity,
            cached_perplexity=1.0,
            cache=CacheConfig(),
            seconds=0.0,
            multiples=multiples,
        )
        for segment, rate, perplexity, multiples in (
            (10, 0.5, 7.0, (1.0,)),
            (10, 0.6, 6.0, (1.0,)),
            (10, 0.7, 5.0, (0.5, 2.0)),
            (5, 0.8, 4.0, (1.0,)),
        )
    ]
    assert starting_settings(trials, "sgd", 10)["rate"] == 0.6
    assert starting_settings(trials, "sgd", 20) == STARTS["sgd"]
