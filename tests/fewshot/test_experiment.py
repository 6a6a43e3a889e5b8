import json
import math
from dataclasses import replace
from statistics import mean

import pytest
import torch

from metalm.fewshot.experiment import load, schedule, score, train
from metalm.fewshot.glyphs import draw_glyphs
from metalm.fewshot.methods import METRIC, made
from metalm.fewshot.presets import NetworkConfig, ScoringConfig, preset
from metalm.fewshot.scoring import score_of_answers
from metalm.fewshot.sources import episode_source
from metalm.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def images():
    return draw_glyphs(alphabets=5, letters=8, drawings=6, seed=2)


def tiny(method, **training):
    config = preset(method, way=3, shot=1)
    settings = {"steps": 3, "tasks": 2, "way": 4, "shot": 1, "query": 2} | training
    if method == "snail":
        settings["way"] = 3
    return replace(
        config,
        task=replace(config.task, query=2, validation_share=0.2),
        network=NetworkConfig(width=4),
        training=replace(config.training, **settings),
        scoring=ScoringConfig(tasks=7),
    )


@pytest.mark.parametrize("method", METRIC)
def test_every_method_trains_is_saved_and_scored(method, images, tmp_path):
    config, folder = tiny(method), RunFolder(tmp_path)
    trained = train(config, folder, images)
    again = load(config, folder, images)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    result = score(config, again, folder, images)
    episode = episode_source(config.task, "test", config.seed, None, images).sample(7)
    answers = trained.predict(*episode[:3])
    expected = score_of_answers(answers, episode.query_targets).tolist()
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["tasks"] == expected
    assert math.isclose(result.score.mean, mean(expected))
    assert stored["facts"]["batch_normalisation"] == trained.statistics


def test_a_finished_run_is_not_trained_again(images, tmp_path):
    config, folder = tiny("prototypical"), RunFolder(tmp_path)
    train(config, folder, images)
    before = folder.weights("method").read_bytes()
    lines = (folder.stage("method") / "metrics.jsonl").read_text()
    assert '"evaluation"' in lines
    train(config, folder, images)
    assert folder.weights("method").read_bytes() == before
    with pytest.raises(ValueError, match=r"another run; .* other values for training\.steps"):
        train(tiny("prototypical", steps=4), folder, images)


def test_too_few_pictures_are_refused_before_training(images, tmp_path):
    config = tiny("prototypical")
    config = replace(config, task=replace(config.task, query=6))
    with pytest.raises(ValueError, match=r"has too few pictures; expected at least 7 .* found 6"):
        train(config, RunFolder(tmp_path / "run"), images)
    assert not (tmp_path / "run").exists()


def test_unknown_methods_and_tasks_without_pictures():
    with pytest.raises(ValueError, match=r"unknown method; expected one of .*, found 'mamml'"):
        made(tiny("mamml"))
    with pytest.raises(ValueError, match=r"'relation' compares pictures; .* found 'sine'"):
        made(replace(tiny("relation"), task=replace(tiny("relation").task, source="sine")))


def test_learning_rates():
    config = tiny("prototypical", steps=10, rate=0.2)
    rate = schedule(config)
    assert rate(0) == 0.2
    assert math.isclose(rate(5), 0.1)
    assert math.isclose(rate(10), 0.0, abs_tol=1e-12)
    halved = schedule(tiny("prototypical", steps=10, rate=0.2, halve_every=4))
    assert [halved(step) for step in (0, 3, 4, 9)] == [0.2, 0.2, 0.1, 0.05]
