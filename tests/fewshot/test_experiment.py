import json
import math
import re
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
from safetensors import safe_open

from metalm.fewshot.experiment import load, schedule, score, train
from metalm.fewshot.method_names import (
    BY_CLASS,
    METRIC,
    OPTIMIZATION,
    made,
    most_ways,
    names_of_methods,
)
from metalm.fewshot.presets import (
    AdaptationConfig,
    FewShotConfig,
    MetaTrainingConfig,
    NetworkConfig,
    ScoringConfig,
    preset,
    within_classes,
)
from metalm.fewshot.scoring import score_of_answers
from metalm.fewshot.shown_tasks import draw_tasks
from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.linear import bayes_error
from metalm.fewshot.tasks.sources import TaskConfig, episode_source, split_classes
from metalm.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def images():
    return draw_glyphs(alphabets=5, letters=8, drawings=6, seed=2)


def tiny(method, **training):
    config = preset(method, way=3, shot=1)
    settings = {"steps": 3, "tasks": 2, "way": 4, "shot": 1, "query": 2} | training
    if method not in METRIC or method == "snail":
        settings["way"] = 12 if method == "transfer" else 3
    adaptation = replace(config.adaptation, test_steps=3)
    return replace(
        config,
        task=replace(config.task, query=2, validation_share=0.2),
        network=replace(config.network, width=4),
        training=replace(config.training, **settings),
        adaptation=adaptation,
        scoring=ScoringConfig(tasks=7),
    )


@pytest.mark.parametrize("method", names_of_methods("glyphs"))
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


@pytest.mark.parametrize("method", OPTIMIZATION)
def test_every_method_of_inner_updates_learns_curves(method, tmp_path):
    config = preset(method, "sine", shot=5)
    config = replace(
        config,
        training=replace(config.training, steps=2, tasks=3),
        scoring=replace(config.scoring, tasks=5),
    )
    trained = train(config, RunFolder(tmp_path))
    result = score(config, trained, RunFolder(tmp_path))
    episode = episode_source(config.task, "test", config.seed).sample(5)

    def error_after(updates):
        trained.test_steps = updates
        return float((trained.predict(*episode[:3]) - episode[3]).square().mean())

    used = config.adaptation.test_steps
    assert math.isclose(result.score.mean, error_after(used), rel_tol=1e-5)
    assert result.facts["batch_normalisation"] == "none"
    assert result.facts["updates"] == used
    # What the literature reports, as far as the method goes.
    assert tuple(result.after) == tuple(n for n in (0, 1, 5, 10) if n <= used)
    for updates, found in result.after.items():
        assert math.isclose(found.mean, error_after(updates), rel_tol=1e-5)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["after"]["0"]["mean"] == result.after[0].mean


@pytest.mark.parametrize("checkpoints", ["auto", "least"])
@pytest.mark.parametrize("method", OPTIMIZATION)
def test_checkpoints_change_no_method(method, checkpoints, tmp_path):
    """The same training but for rounding; a run goes on with another choice of memory."""
    config = preset(method, "sine", shot=5)
    config = replace(config, training=replace(config.training, steps=2, tasks=3))
    config = replace(config, adaptation=replace(config.adaptation, steps=6, step_weights=()))
    usual = train(config, RunFolder(tmp_path / "usual"))
    spare = replace(config, adaptation=replace(config.adaptation, checkpoints=checkpoints))
    spared = train(spare, RunFolder(tmp_path / "spare"))
    assert getattr(spared, "segment", checkpoints) == checkpoints
    for name, value in usual.state_dict().items():
        torch.testing.assert_close(spared.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert train(spare, RunFolder(tmp_path / "usual"))


def test_lines_are_scored_beside_the_best_that_is_possible(tmp_path):
    """The oracle's score is what `bayes_error` expects; a method that learnt little is behind."""
    results = {}
    for method in ("maml", "posterior-mean"):
        config = preset(method, "linear", shot=5)
        config = replace(
            config,
            training=replace(config.training, steps=2, tasks=3),
            scoring=replace(config.scoring, tasks=400),
        )
        folder = RunFolder(tmp_path / method)
        trained = train(config, folder)
        results[method] = score(config, trained, folder).score.mean
        assert draw_tasks(config, trained, folder.folder) == folder.folder / "curves.png"
    episode = episode_source(config.task, "test", config.seed).sample(400)
    expected = bayes_error(episode[0], episode[2], spread=1.0, noise=0.1).mean()
    by_task = (trained.predict(*episode[:3]) - episode[3]).square().mean((1, 2))
    assert results["posterior-mean"] == pytest.approx(float(by_task.mean()), rel=1e-5)
    assert abs(results["posterior-mean"] - float(expected)) < 4 * float(by_task.std()) / 20
    assert results["maml"] > 10 * results["posterior-mean"]


@pytest.mark.parametrize("source", ["sine", "glyphs", "omniglot"])
def test_learned_steps_are_used_as_often_as_they_were_learned_for(source):
    for method in ("meta-sgd", "lstm-meta-learner"):
        adaptation = preset(method, source).adaptation
        assert adaptation.test_steps == adaptation.steps


def test_presets_for_omniglot_are_the_published_ones():
    maml = preset("maml", "omniglot")
    assert (maml.network.pooling, maml.adaptation.steps, maml.adaptation.test_steps) == (
        "stride", 1, 3,
    )  # fmt: skip
    reptile = preset("reptile", "omniglot")
    assert reptile.network.pooling == "max"  # published: stride
    inner = reptile.adaptation
    assert (inner.rate, inner.steps, inner.test_steps, inner.batch) == (
        3e-3,
        5,
        50,
        10,
    )  # 1e-3 published
    assert reptile.training.shot == 10
    many = preset("reptile", "omniglot", 20).adaptation
    assert (many.rate, many.steps, many.test_steps, many.batch, many.test_batch) == (
        5e-4, 10, 50, 20, 10,
    )  # fmt: skip
    prototypical = preset("prototypical", "omniglot", 20).training
    assert (prototypical.way, prototypical.query) == (60, 5)


def test_presets_for_glyphs_take_minutes():
    for method in names_of_methods("glyphs"):
        assert preset(method).training.steps <= 2000


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


def test_a_finished_run_is_scored_in_another_way(images, tmp_path):
    """With other test tasks and updates, which nothing was trained for; and so it stays."""
    config, folder = tiny("maml"), RunFolder(tmp_path)
    method = train(config, folder, images)
    before = folder.weights("method").read_bytes()
    scoring = replace(config.scoring, tasks=config.scoring.tasks + 3, updates=(0, 2))
    other = replace(config, scoring=scoring, root="elsewhere")
    other = replace(other, adaptation=replace(config.adaptation, test_steps=4))
    result = score(other, train(other, folder, images), folder, images)
    assert result.score.tasks == config.scoring.tasks + 3
    assert result.facts["updates"] == 4
    assert list(result.after) == [0, 2]
    assert folder.weights("method").read_bytes() == before
    assert folder.read_configuration()["scoring"]["updates"] == [0, 2]
    # Before it is finished, updates in use are looked at in validation.
    folder.weights("method").unlink()
    more = replace(other, adaptation=replace(other.adaptation, test_steps=5))
    with pytest.raises(ValueError, match=r"other values for adaptation\.test_steps"):
        train(more, folder, images)
    assert method.test_steps != 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": 1}, r"expected --scoring\.tasks of at least 2, found 1"),
        ({"updates": (1, -1)}, r"expected --scoring\.updates of at least 0, found 1, -1"),
    ],
)
def test_impossible_scorings_are_refused_before_training(wrong, message):
    with pytest.raises(ValueError, match=message):
        ScoringConfig(**wrong)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (TaskConfig, {"way": 1}, "task.way is too low; expected at least 2, found 1"),
        (TaskConfig, {"shot": 0}, "task.shot is too low; expected at least 1, found 0"),
        (TaskConfig, {"query": 0}, "task.query is too low"),
        (TaskConfig, {"size": 0}, "task.size is too low"),
        (TaskConfig, {"validation_groups": -1}, "task.validation_groups is too low; expected at"),
        (TaskConfig, {"test_share": math.nan}, "impossible task.test_share; expected 0 <= test_"),
        (TaskConfig, {"validation_share": 1.0}, "impossible task.validation_share"),
        (NetworkConfig, {"width": 0}, "network.width is too low; expected at least 1, found 0"),
        (NetworkConfig, {"depth": 0}, "network.depth is too low"),
        (NetworkConfig, {"late_width": -1}, "network.late_width is too low; expected at least 0"),
        (NetworkConfig, {"halvings": -1}, "network.halvings is too low"),
        (NetworkConfig, {"reach": -1}, "network.reach is too low"),
        (AdaptationConfig, {"steps": -1}, "adaptation.steps is too low; expected at least 0"),
        (AdaptationConfig, {"test_steps": -1}, "adaptation.test_steps is too low"),
        (AdaptationConfig, {"together": -1}, "adaptation.together is too low; expected at least 0"),
        (AdaptationConfig, {"batch": -1}, "adaptation.batch is too low"),
        (AdaptationConfig, {"test_batch": -1}, "adaptation.test_batch is too low"),
        (AdaptationConfig, {"rate": math.inf}, "impossible adaptation.rate; expected 0 <= rate"),
        (MetaTrainingConfig, {"tasks": 0}, "training.tasks is too low; expected at least 1"),
        (MetaTrainingConfig, {"steps": -1}, "training.steps is too low; expected at least 0"),
        (MetaTrainingConfig, {"way": -1}, "training.way is too low"),
        (MetaTrainingConfig, {"shot": -1}, "training.shot is too low"),
        (MetaTrainingConfig, {"query": -1}, "training.query is too low"),
        (MetaTrainingConfig, {"halve_every": -1}, "training.halve_every is too low"),
        (MetaTrainingConfig, {"rate": -0.1}, "impossible training.rate"),
        (MetaTrainingConfig, {"clip": math.nan}, "impossible training.clip"),
        (FewShotConfig, {"threads": -1}, "threads is too low; expected at least 0, found -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_where_they_are_set(kind, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**wrong)


def test_the_least_sizes_that_are_documented_can_be(images, tmp_path):
    """0 stands for all, for none, or for as in use; a method of no update answers as it is."""
    config = tiny("maml", steps=1, way=0, shot=0, query=0, clip=0.0)
    inner = replace(config.adaptation, steps=0, test_steps=0, together=0, batch=0, test_batch=0)
    config = replace(config, adaptation=inner)
    method = train(config, RunFolder(tmp_path), images)
    episode = episode_source(config.task, "test", config.seed, None, images).sample(2)
    expected = torch.stack([method.network(query).detach() for query in episode.query_inputs])
    torch.testing.assert_close(method.predict(*episode[:3]), expected)


def test_reptile_without_an_update_is_refused_where_it_is_set():
    config = preset("reptile")
    with pytest.raises(ValueError, match=r"without one it learns nothing; .* found 0; do take"):
        replace(config, adaptation=replace(config.adaptation, steps=0))
    assert replace(config, method="maml", adaptation=replace(config.adaptation, steps=0))


def test_omniglot_is_split_as_in_the_literature():
    count, config = 1623, TaskConfig()
    assert round(config.test_share * count) == 423
    pictures = np.zeros((count, 1, 1, 1), dtype=np.uint8)
    images = LabelledImages(pictures, np.arange(count), tuple(map(str, range(count))))
    split = split_classes(config, images, 1)
    assert (len(split.test), len(split.train) + len(split.validation)) == (423, 1200)


def test_within_groups_presets_train_on_as_many_ways_as_in_use(images):
    many = preset("prototypical", way=4)
    within = replace(many, task=replace(many.task, within_groups=True))
    assert within_classes(within, images).training.way == 4


def test_a_checkpoint_from_before_a_setting_of_tasks_is_continued(images, tmp_path):
    """One that says nothing of channels and ink; with other ones it is another training."""
    config, folder = tiny("prototypical"), RunFolder(tmp_path)
    wanted = train(config, folder, images).state_dict()
    folder.weights("method").unlink()
    checkpoints = list(folder.stage("method").glob("*.safetensors"))
    assert checkpoints
    for newest in checkpoints:
        with safe_open(newest, "pt") as file:
            assert "task.query" in str(file.metadata())
            assert "channels" not in str(file.metadata())
    again = train(config, folder, images).state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    folder.weights("method").unlink()
    folder.configuration_path.unlink()
    grey = replace(config, task=replace(config.task, channels=1))
    with pytest.raises(ValueError, match=r"expected task\.channels = 1, found nothing"):
        train(grey, folder, images)


def test_too_few_pictures_are_refused_before_training(images, tmp_path):
    config = tiny("prototypical")
    config = replace(config, task=replace(config.task, query=6))
    with pytest.raises(ValueError, match=r"has too few pictures; expected at least 7 .* found 6"):
        train(config, RunFolder(tmp_path / "run"), images)
    assert not (tmp_path / "run").exists()


def test_too_few_classes_to_choose_on_are_refused_before_the_folder_is_taken(images, tmp_path):
    config, folder = tiny("prototypical"), RunFolder(tmp_path / "run")
    default = replace(config, task=replace(config.task, validation_share=0.05))
    advice = r"to choose on .* found 2 .* raise --task\.validation-share from 0\.05 to 0\.08"
    with pytest.raises(ValueError, match=advice):
        train(default, folder, images)
    assert not folder.folder.exists()
    train(replace(config, task=replace(config.task, validation_share=0.08)), folder, images)
    assert folder.has("method")
    # What learns nothing chooses nothing.
    pixels = replace(default, method="pixels")
    train(pixels, RunFolder(tmp_path / "pixels"), images)


def test_presets_train_on_no_more_ways_than_there_are(images):
    """40 glyphs: 10 for the test and 2 to choose on leave 28, and four times as many turned."""
    many = preset("prototypical")
    assert within_classes(many, images) == many
    assert within_classes(many, None) == many
    straight = replace(many, task=replace(many.task, rotations=False))
    fitted = within_classes(straight, images)
    assert fitted == replace(straight, training=replace(many.training, way=28))
    source = episode_source(fitted.task, "train", 1, fitted.trained_on, images)
    assert source.sample(1).query_targets.unique().tolist() == list(range(28))
    as_in_use = replace(straight, training=replace(many.training, way=0))
    assert within_classes(as_in_use, images) == as_in_use


def test_unknown_methods_and_tasks_without_pictures():
    with pytest.raises(ValueError, match=r"no such method .*; expected one of .*, found 'mamml'"):
        made(tiny("mamml"))
    with pytest.raises(ValueError, match=r"no such method for tasks of 'sine'; .* 'relation'"):
        made(replace(tiny("relation"), task=replace(tiny("relation").task, source="sine")))


@pytest.mark.parametrize("method", names_of_methods("glyphs"))
def test_a_preset_trains_on_tasks_that_its_method_can_have(method):
    """One meta-gradient with the preset's own ways; more ways than the head has are refused."""
    drawn = draw_glyphs(alphabets=5, letters=18, drawings=5, seed=2, size=22)
    config = preset(method)
    config = replace(
        config,
        task=replace(config.task, size=22, query=2, validation_share=0.1),
        network=replace(config.network, width=2),
        training=replace(config.training, shot=1, query=1),
        adaptation=replace(config.adaptation, steps=1),
    )
    by_class = {"by_class": method in BY_CLASS}
    source = episode_source(config.task, "train", 1, config.trained_on, drawn, **by_class)
    assert math.isfinite(made(config, drawn).meta_gradient(source.sample(1)).loss)
    if most_ways(config) is None or method in BY_CLASS:
        return
    more = replace(config, training=replace(config.training, way=6))
    with pytest.raises(ValueError, match=r"at most .* as in use \(5\), found 6; lower --training"):
        made(more, drawn)


def test_learning_rates():
    config = tiny("prototypical", steps=10, rate=0.2)
    rate = schedule(config)
    assert rate(0) == 0.2
    assert math.isclose(rate(5), 0.1)
    assert math.isclose(rate(10), 0.0, abs_tol=1e-12)
    halved = schedule(tiny("prototypical", steps=10, rate=0.2, halve_every=4))
    assert [halved(step) for step in (0, 3, 4, 9)] == [0.2, 0.2, 0.1, 0.05]
