"""The four trainings where the base is trained by a published recipe."""

import dataclasses
from functools import partial

import pytest
import torch

from metalm.language.run import stages as stages_module
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.stages import STAGES, Stages
from metalm.language.run.trained import load_trained
from metalm.language.text.vocabulary import closed_words
from metalm.language.training.awd_training import AwdTrainingConfig
from metalm.language.training.base_training import one_cycle
from metalm.training import loop
from metalm.training.record import Record, read


class KilledError(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture(scope="module", params=["nt-asgd", "one-cycle"])
def published(request, trained_run, tmp_path_factory):
    """All four trainings, with the steps' learning rates: (config, corpus, folder, rates)."""
    config, corpus, _ = trained_run
    awd = AwdTrainingConfig(
        recipe=request.param,
        epochs=4,
        rows=3,
        window=9,
        learning_rate=2.0 if request.param == "nt-asgd" else 0.02,
        non_monotone=0,
        validation_rows=2,
    )
    data = dataclasses.replace(config.data, held_out=0.0)
    config = dataclasses.replace(config, data=data, awd=awd)
    folder = LanguageRunFolder(tmp_path_factory.mktemp("runs") / request.param)
    rates = {}

    def run(training, **options):
        step, found = training.step, rates.setdefault(options["title"], [])

        def noted(index):
            values = step(index)
            groups = getattr(training, "model_optimizer", None) or training
            if options["title"] == "joint":
                found.append(groups.param_groups[0]["lr"])
            else:
                found.append(values.get("learning_rate"))
            return values

        training.step = noted
        loop.run(training, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "Record", partial(Record, tensorboard=False))
        patch.setattr(stages_module, "run", run)
        for name in STAGES:
            Stages(config, corpus, folder).train(name)
    return config, corpus, folder, rates


def test_every_stage_leaves_what_reading_needs(published):
    config, corpus, folder, _ = published
    models = load_trained(folder, config, corpus.train)
    assert set(models.models) == {"control", "joint"}
    assert set(models.rules) == {"rule", "joint"}
    weights = {name: folder.load(name)[0] for name in ("base", "control", "joint")}
    key = "model.layers.0.hidden_weight"
    assert not torch.equal(weights["base"][key], weights["control"][key])
    assert not torch.equal(weights["base"][key], weights["joint"][key])
    assert not any(name.startswith("optimizer") for name in weights["base"])


def test_control_and_joint_have_a_schedule_of_their_own(published):
    """It begins low, rises to the highest rate and ends low, in both alike."""
    config, _, _, rates = published
    base, joint = config.base, config.joint
    steps = base.steps(joint.tokens)
    shares = [one_cycle(n / steps, base.warm_up, base.final_rate) for n in range(steps)]
    assert rates["control"] == pytest.approx([base.learning_rate * share for share in shares])
    assert len(rates["joint"]) == 10
    assert rates["joint"][1] > rates["joint"][-1] > 0
    for number, rate in enumerate(rates["joint"]):
        share = shares[min(steps - 1, round(number * steps / 10))]
        if round(number * steps / 10) < steps:
            assert rate == pytest.approx(joint.model_learning_rate * share)


def test_the_base_reads_every_article_and_so_does_the_rule(published):
    config, corpus, folder, _ = published
    stages = Stages(config, corpus, folder)
    assert stages.base_articles.titles == stages.held_out_articles.titles == corpus.train.titles
    tokens = sum(
        line["values"]["tokens"] * 20 for line in read(folder.stage("base"))[:-1]
    )  # each line is the mean of twenty steps
    assert 0 < tokens <= config.awd.epochs * corpus.train.num_tokens
    losses = [line["values"].get("validation_loss") for line in read(folder.stage("base"))]
    assert all(loss is None or 0 < loss < 10 for loss in losses)
    assert any(loss is not None for loss in losses)


def test_a_killed_base_goes_on_to_the_same_bits(published, tmp_path, monkeypatch):
    """Killed in the first pass, and after averages may have begun."""
    config, corpus, unbroken, rates = published
    folder = LanguageRunFolder(tmp_path / "run")
    steps = len(rates["base"])
    for last_step in (3, round(0.6 * steps), steps - 1, None):

        def run(training, last_step=last_step, **options):
            step = training.step

            def limited(index):
                if index == last_step:
                    raise KilledError
                return step(index)

            training.step = limited
            loop.run(training, **options | {"save_every_steps": 2})

        monkeypatch.setattr(stages_module, "run", run)
        torch.manual_seed(last_step or 0)
        if last_step is None:
            Stages(config, corpus, folder).train("base")
            break
        with pytest.raises(KilledError):
            Stages(config, corpus, folder).train("base")
    expected, form = unbroken.load("base")
    found, found_form = folder.load("base")
    assert form == found_form
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def test_a_checkpoint_of_another_recipe_is_refused(published, tmp_path, monkeypatch):
    config, corpus, _, _ = published
    folder = LanguageRunFolder(tmp_path / "run")

    def run(training, **options):
        loop.run(training, **options | {"num_steps": 2})

    monkeypatch.setattr(stages_module, "run", run)
    Stages(config, corpus, folder).train("base")
    folder.weights("base").unlink()
    other = dataclasses.replace(config, awd=dataclasses.replace(config.awd, alpha=7.0))
    with pytest.raises(ValueError, match=r"expected awd\.alpha = 7\.0, found 2\.0"):
        Stages(other, corpus, folder).train("base")


def test_a_base_goes_on_from_that_of_another_run(published, tmp_path, monkeypatch):
    """At a rate of 0 it stays what it was; no other base has its weights."""
    config, corpus, before, _ = published
    corpus.vocabulary.save(before.vocabulary_path)
    monkeypatch.setattr(stages_module, "Record", partial(Record, tensorboard=False))
    still = dataclasses.replace(
        config.awd, start=str(before.folder), epochs=1, learning_rate=0.0, weight_decay=0.0
    )
    folder = LanguageRunFolder(tmp_path / "run")
    Stages(dataclasses.replace(config, awd=still), corpus, folder).train("base")
    given, left = before.load("base")[0], folder.load("base")[0]
    assert given.keys() == left.keys()
    for key, tensor in given.items():
        assert torch.equal(tensor, left[key]), key
    moving = dataclasses.replace(still, learning_rate=config.awd.learning_rate)
    folder = LanguageRunFolder(tmp_path / "other")
    Stages(dataclasses.replace(config, awd=moving), corpus, folder).train("base")
    key = "model.layers.0.hidden_weight"
    assert not torch.equal(given[key], folder.load("base")[0][key])


def test_a_base_of_another_size_is_no_start(published, tmp_path):
    config, corpus, before, _ = published
    awd = dataclasses.replace(config.awd, start=str(before.folder))
    model = dataclasses.replace(config.model, hidden_size=config.model.hidden_size + 1)
    other = dataclasses.replace(config, awd=awd, model=model)
    with pytest.raises(ValueError, match=r"base\.safetensors does not fit the configuration"):
        Stages(other, corpus, LanguageRunFolder(tmp_path / "run")).train("base")


def test_a_base_of_other_words_is_no_start(published, tmp_path):
    config, corpus, trained, _ = published
    before = LanguageRunFolder(tmp_path / "before")
    before.folder.mkdir()
    before.save("base", *trained.load("base"))
    other = closed_words(["a b c"], add_unknown=True)
    other.save(before.vocabulary_path)
    awd = dataclasses.replace(config.awd, start=str(before.folder))
    stages = Stages(
        dataclasses.replace(config, awd=awd), corpus, LanguageRunFolder(tmp_path / "run")
    )
    with pytest.raises(
        ValueError, match=f"another vocabulary than .*expected .*{other.checksum[:16]}"
    ):
        stages.train("base")


def test_a_start_without_a_recipe_is_refused():
    with pytest.raises(ValueError, match=r"awd\.recipe nt-asgd or one-cycle .* found off"):
        AwdTrainingConfig(start="runs/a")


def test_a_joint_training_of_no_tokens_leaves_the_base(published, tmp_path):
    """Rivals and metalm then read with one model."""
    config, corpus, trained, _ = published
    joint = dataclasses.replace(config.joint, tokens=0)
    config = dataclasses.replace(config, joint=joint)
    folder = LanguageRunFolder(tmp_path / "run")
    for name in ("base", "rule"):
        tensors, meta = trained.load(name)
        folder.save(name, tensors, meta)
    for name in ("control", "joint"):
        Stages(config, corpus, folder).train(name)
        left, given = folder.load(name)[0], folder.load("base")[0]
        for key in (key for key in given if key.startswith("model")):
            torch.testing.assert_close(left[key], given[key], rtol=0, atol=0)
    rule, joint_rule = folder.load("rule")[0], folder.load("joint")[0]
    for key, tensor in rule.items():
        torch.testing.assert_close(joint_rule[key], tensor, rtol=0, atol=0)
    models = load_trained(folder, config, corpus.train).models
    assert models["joint"] is models["control"]


def test_models_that_differ_stay_two(published):
    config, corpus, folder, _ = published
    models = load_trained(folder, config, corpus.train).models
    assert models["joint"] is not models["control"]
