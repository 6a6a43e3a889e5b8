"""A run with clusters, from the trainings to the saved model."""

import dataclasses

import numpy as np
import pytest
import torch

from metalm.language import ship
from metalm.language.pretrained import Pretrained
from metalm.language.run import experiment, stages
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.trained import load_trained
from metalm.training import loop


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """The run of the other tests with clusters: (config, corpus, folder)."""
    config, corpus, _ = trained_run
    model = dataclasses.replace(config.model, cutoffs=(5, 9), shrink=2)
    config = dataclasses.replace(config, model=model)
    folder = LanguageRunFolder(tmp_path_factory.mktemp("clusters") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "Record", _SilentRecord)
        experiment.train(config, corpus, folder, stages.STAGES)
    return config, corpus, folder


class _SilentRecord(stages.Record):
    """Importing TensorBoard takes seconds."""

    def __init__(self, folder):
        super().__init__(folder, tensorboard=False)


def test_every_part_of_both_ends_is_trained(run):
    """By the base, and again in the joint training; tails too."""
    _, _, folder = run
    base, joint = (folder.load(name)[0] for name in ("base", "joint"))
    parts = [name for name in base if name.startswith(("model.embedding", "model.decoder"))]
    assert len(parts) == 6
    for name in parts:
        changed = (base[name] != joint[name]).double().mean()
        assert changed > 0.9, name
    rule = folder.load("rule")[0]
    assert "rule.log_rate/embedding/tails/1/weight" in rule


@pytest.mark.parametrize("name", ["base", "joint"])
def test_a_stopped_training_goes_on_to_the_same_bits(run, tmp_path, monkeypatch, name):
    config, corpus, unbroken = run
    folder = LanguageRunFolder(tmp_path / "run")
    folder.folder.mkdir()
    for before in ("base", "rule") if name == "joint" else ():
        folder.weights(before).write_bytes(unbroken.weights(before).read_bytes())

    def stop(training, *, num_steps, **options):
        loop.run(training, num_steps=5, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "Record", _SilentRecord)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.Stages(config, corpus, folder).train(name)
    stages.Stages(config, corpus, folder).train(name)
    expected, found = unbroken.load(name), folder.load(name)
    assert found[1] == expected[1]
    for key, tensor in expected[0].items():
        assert torch.equal(tensor, found[0][key]), key


def test_evaluated_saved_and_loaded(run, tmp_path):
    config, corpus, folder = run
    experiment.tune_run(config, corpus, folder, ["reset"])
    models = load_trained(folder, config, None)
    trials = experiment.read_trials(folder, "reset")
    scored = experiment.score(config, models, trials, corpus.test, folder, "test", "reset")
    assert np.isfinite(scored.scores.nats("metalm")).all()
    model = ship.pretrained_of(folder)
    assert "--model.cutoffs 5 9" in model.config.origin.command
    model.save_pretrained(tmp_path / "saved")
    loaded = Pretrained.from_pretrained(tmp_path / "saved")
    assert loaded.config.model == config.model
    tokens = corpus.test[0].tokens
    nats = loaded.reader().read(tokens).nats
    np.testing.assert_array_equal(nats, model.reader().read(tokens).nats)
    ship.ship(model, tmp_path / "shipped", torch.bfloat16, 0)
    rounded = Pretrained.from_pretrained(tmp_path / "shipped").reader().read(tokens).nats
    np.testing.assert_allclose(rounded, nats, rtol=0.08)
