"""Every training of a run: killed, started again, and equal to an unbroken one in every bit."""

import dataclasses
import shutil

import pytest
import torch

from metalm.language.run import experiment
from metalm.language.run import stages as stages_module
from metalm.language.run.stages import STAGES, Stages, hold_out
from metalm.language.run.trained import load_trained
from metalm.training import loop
from metalm.training.record import read


class KilledError(Exception):
    """Stands for a kill between two steps."""


def run_and_die(last_step):
    """The loop, saving after every second step, that dies before this step."""

    def run(training, **options):
        step = training.step

        def limited(index):
            if index == last_step:
                raise KilledError
            return step(index)

        training.step = limited
        loop.run(training, **options | {"save_every_steps": 2})

    return run


def test_rows_that_cannot_be_read_in_parts_are_refused_before_the_first_is_trained(
    trained_run, tmp_path
):
    config, corpus, unbroken = trained_run
    few = dataclasses.replace(config.joint, rows=3)
    config = dataclasses.replace(config, accumulation=4, joint=few)
    with pytest.raises(ValueError, match="3 rows cannot be read in 4 parts; expected 1 to 3"):
        Stages(config, corpus, type(unbroken)(tmp_path)).refuse_unready(["base", "joint"])


def test_too_few_articles_for_a_flush_are_refused_before_the_first_is_trained(
    trained_run, tmp_path
):
    config, corpus, unbroken = trained_run
    few = dataclasses.replace(corpus, train=corpus.train.select([0]))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.0))
    for flush in (True, False):
        tuning = dataclasses.replace(config.tuning, flush=flush)
        stages = Stages(dataclasses.replace(config, tuning=tuning), few, type(unbroken)(tmp_path))
        if not flush:
            stages.refuse_unready(["base"])
            continue
        with pytest.raises(ValueError, match="found 1 articles; give more text, or add"):
            stages.refuse_unready(["base"])


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_goes_on_to_the_same_bits(trained_run, tmp_path, monkeypatch, name):
    config, corpus, unbroken = trained_run
    folder = type(unbroken)(tmp_path / "run")
    folder.folder.mkdir()
    for before in STAGES[: STAGES.index(name)]:
        shutil.copy(unbroken.weights(before), folder.weights(before))
    for last_step in (3, 7, 7, None):
        monkeypatch.setattr(stages_module, "run", run_and_die(last_step))
        training = Stages(config, corpus, folder)
        torch.manual_seed(last_step or 0)
        if last_step is None:
            training.train(name)
            break
        with pytest.raises(KilledError):
            training.train(name)
        assert not folder.has(name)
        checkpoints = sorted(path.name for path in folder.stage(name).glob("*.safetensors"))
        assert checkpoints[-1] == f"checkpoint-{last_step - 1:09d}.safetensors"
    expected, form = unbroken.load(name)
    found, found_form = folder.load(name)
    assert form == found_form
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def test_what_is_trained_is_not_trained_again(trained_run, monkeypatch):
    config, corpus, folder = trained_run
    monkeypatch.setattr(stages_module, "run", None)
    for name in STAGES:
        Stages(config, corpus, folder).train(name)


def test_counting_gradients_shows_what_is_done(trained_run, tmp_path, monkeypatch, capsys):
    """Six articles of 35 tokens in 13 rows of 16: four segments of four, for the rule and after."""
    config, corpus, unbroken = trained_run
    for name in ("base", "control"):
        shutil.copy(unbroken.weights(name), tmp_path)
    folder = type(unbroken)(tmp_path)
    stages = Stages(config, corpus, folder)
    monkeypatch.setattr(stages_module, "run", lambda *arguments, **options: None)
    stages.train("rule")
    assert "gradient statistics, segments of 4: 4/4" in capsys.readouterr().err
    load_trained(folder, config, stages.base_articles)
    assert "gradient statistics, segments of 4: 4/4" in capsys.readouterr().err
    load_trained(folder, config, None)
    assert "gradient statistics" not in capsys.readouterr().err


def test_stages_change_what_they_should(trained_run):
    _, _, folder = trained_run
    base, control, joint = (folder.load(name)[0] for name in ("base", "control", "joint"))
    rule, again = (folder.load(name)[0] for name in ("rule", "joint"))
    weights = [key for key in control if key.startswith("model.")]
    assert weights
    for key in weights:
        assert not torch.equal(base[key], control[key])
        assert not torch.equal(base[key], joint[key])
        assert not torch.equal(control[key], joint[key])
    learned = [key for key in rule if "log_rate" in key]
    assert learned
    for key in learned:
        assert not torch.equal(rule[key], again[key])


@pytest.mark.parametrize(
    ("name", "steps"), [("base", 12), ("control", 9), ("rule", 10), ("joint", 10)]
)
def test_a_stage_of_a_few_steps_is_on_record(trained_run, name, steps):
    _, _, folder = trained_run
    (line,) = read(folder.stage(name))
    assert (line["kind"], line["step"]) == ("train", steps)
    assert line["values"]["loss"] > 0


def test_an_unknown_stage(trained_run):
    with pytest.raises(ValueError, match="unknown stage; expected some of base, control, rule, jo"):
        Stages(*trained_run).train("bass")


@pytest.mark.parametrize(("name", "missing"), [("control", "base"), ("joint", "base")])
def test_a_stage_whose_predecessor_has_not_finished(trained_run, tmp_path, name, missing):
    config, corpus, folder = trained_run
    with pytest.raises(ValueError, match=f"has no '{missing}' yet.* --stages {missing}"):
        Stages(config, corpus, type(folder)(tmp_path)).train(name)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("base", "joint"), "rule"),
        (("rule", "base"), "base"),
        (("base", "control", "joint", "rule"), "rule"),
    ],
)
def test_stages_out_of_order_are_refused_before_the_first_is_trained(
    trained_run, tmp_path, monkeypatch, names, missing
):
    config, corpus, folder = trained_run
    monkeypatch.setattr(stages_module, "run", None)
    empty = type(folder)(tmp_path / "run")
    with pytest.raises(ValueError, match=f"has no '{missing}' yet.* --stages {missing}"):
        experiment.train(config, corpus, empty, names)
    assert not empty.folder.exists()


@pytest.mark.parametrize(
    ("there", "names"),
    [
        ((), STAGES),
        ((), ("base", "rule", "joint", "control")),
        (("base",), ("rule", "joint")),
        (("base", "rule"), ("joint",)),
        (("joint",), ("joint",)),
    ],
)
def test_stages_in_order_are_not_refused(trained_run, tmp_path, there, names):
    config, corpus, unbroken = trained_run
    for name in there:
        shutil.copy(unbroken.weights(name), tmp_path)
    Stages(config, corpus, type(unbroken)(tmp_path)).refuse_unready(names)


@pytest.mark.parametrize(("count", "share"), [(9, 0.3), (2, 0.1), (40, 0.1), (5, 0.5)])
def test_held_out_articles_are_never_read_by_the_base(count, share):
    train, held_out = hold_out(count, share, 1)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(held_out) == max(1, round(count * share))
    assert list(train) == sorted(train)
    assert list(held_out) == sorted(held_out)
    assert hold_out(count, share, 1) == (train, held_out)


def test_one_article_cannot_be_divided():
    with pytest.raises(
        ValueError,
        match=r"at least one beside the 1 that are held out \(a share of 0.1\), found 1",
    ):
        hold_out(1, 0.1, 1)


def test_the_base_reads_its_own_articles_only(trained_run):
    config, corpus, folder = trained_run
    stages = Stages(config, corpus, folder)
    titles = set(stages.base_articles.titles), set(stages.held_out_articles.titles)
    assert titles[0] | titles[1] == set(corpus.train.titles)
    assert not titles[0] & titles[1]
