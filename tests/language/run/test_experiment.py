import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from metalm.analysis.statistics.scores import Scores
from metalm.language import own_texts, ship
from metalm.language.reading.store import ReadingStore
from metalm.language.run import experiment
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import score_split
from metalm.language.run.trained import load_trained
from metalm.language.tuning import comparison as comparison_module
from metalm.language.tuning import tune as tuning_module
from metalm.language.tuning.trials import trial_to_json


@pytest.fixture
def copied_run(trained_run, tmp_path):
    config, corpus, folder = trained_run
    shutil.copytree(folder.folder, tmp_path / "run")
    return config, corpus, LanguageRunFolder(tmp_path / "run")


def test_training_into_the_folder_of_another_run(copied_run):
    config, corpus, folder = copied_run
    before = folder.weights("joint").read_bytes()
    other = dataclasses.replace(config, seed=99)
    with pytest.raises(ValueError, match=r"belongs to another run; .* other values for seed"):
        experiment.train(other, corpus, folder, ["base"])
    assert folder.weights("joint").read_bytes() == before


def test_every_trial_is_kept_and_none_is_repeated(copied_run, monkeypatch, capsys):
    config, corpus, folder = copied_run
    trials = experiment.tune_run(config, corpus, folder, ["carry"])["carry"]
    assert list(trials) == ["none", "sgd", "rms", "joint"]  # the ablation is scored in reset alone
    stored = json.loads((folder.folder / "tuning-carry.json").read_text())["trials"]
    assert {name: len(found) for name, found in stored.items()} == {
        name: len(found) for name, found in trials.items()
    }
    assert capsys.readouterr().err.count("tuning (carry)") == sum(map(len, trials.values()))
    monkeypatch.setattr(comparison_module, "tune", None)
    again = experiment.tune_run(config, corpus, folder, ["carry"])["carry"]
    assert {n: [trial_to_json(t) for t in found] for n, found in again.items()} == stored


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_a_search_that_is_stopped_goes_on_at_its_next_trial(copied_run, monkeypatch, mode):
    config, corpus, folder = copied_run
    spreads = dataclasses.replace(config.tuning, spreads=(2.0,))
    config = dataclasses.replace(config, tuning=spreads)
    whole = experiment.tune_run(config, corpus, folder, [mode])[mode]
    (folder.folder / f"tuning-{mode}.json").unlink()
    plain, tried, stops = tuning_module.try_methods, [], [1, 4, 5, 9]

    def counted(models, methods, *others):
        if stops and len(tried) >= stops[0]:
            del stops[0]
            raise KeyboardInterrupt
        tried.extend(methods)
        return plain(models, methods, *others)

    monkeypatch.setattr(tuning_module, "try_methods", counted)
    begun = folder.folder / f"tuning-{mode}-begun.json"
    left = []
    while stops:
        with pytest.raises(KeyboardInterrupt):
            experiment.tune_run(config, corpus, folder, [mode])
        left.append(begun.exists())
    found = experiment.tune_run(config, corpus, folder, [mode])[mode]
    assert True in left
    assert not begun.exists()
    assert len(tried) == sum(map(len, whole.values()))
    assert [*found] == [*whole]
    for name, trials in whole.items():
        for one, other in zip(found[name], trials, strict=True):
            assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)


@pytest.mark.parametrize("changed", ["nothing", "thetas", "text", "weights"])
def test_a_search_goes_on_only_with_the_same_weights_text_and_grids(
    copied_run, monkeypatch, changed
):
    config, corpus, folder = copied_run
    plain, tried = tuning_module.try_methods, []

    def stopped(models, methods, *others):
        if len(tried) >= 3:
            raise KeyboardInterrupt
        tried.extend(methods)
        return plain(models, methods, *others)

    def counted(models, methods, *others):
        tried.extend(methods)
        return plain(models, methods, *others)

    monkeypatch.setattr(tuning_module, "try_methods", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiment.tune_run(config, corpus, folder, ["reset"])
    begun = json.loads((folder.folder / "tuning-reset-begun.json").read_text())
    done = sum(map(len, begun["trials"].values()))
    assert done > 0
    if changed == "weights":
        tensors, meta = folder.load("control")
        tensors = {name: tensor + 0.01 for name, tensor in tensors.items()}
        folder.save("control", tensors, meta)
        (folder.folder / "tuning-reset.json").unlink()  # searches that are done; see below
    elif changed != "nothing":
        other = {"thetas": {"thetas": (0.123,)}, "text": {"tokens": config.tuning.tokens - 1}}
        tuning = dataclasses.replace(config.tuning, **other[changed])
        config = dataclasses.replace(config, tuning=tuning)
    monkeypatch.setattr(tuning_module, "try_methods", counted)
    tried.clear()
    found = experiment.tune_run(config, corpus, folder, ["reset"])["reset"]
    searched = sum(len(trials) for name, trials in found.items() if name in begun["trials"])
    again = sum(method.learning in begun["trials"] for method in tried)
    assert again == searched - (done if changed == "nothing" else 0)
    if changed == "thetas":
        assert {t.cache.theta for t in found["sgd"]} == {0.123}


@pytest.mark.parametrize("of", ["model control", "rule joint"])
def test_settings_of_other_weights_are_not_taken(copied_run, of):
    """Not to read with, nor to tune further, nor to ship."""
    config, corpus, folder = copied_run
    experiment.tune_run(config, corpus, folder, ["reset"])
    path = folder.folder / "tuning-reset.json"
    stored = json.loads(path.read_text())
    assert {"model control", "model joint", "rule joint"} <= stored["weights"].keys()
    name, part = {"model control": ("control", ""), "rule joint": ("joint", "rule.")}[of]
    tensors, meta = folder.load(name)
    chosen = [key for key in tensors if key.startswith(part) and tensors[key].is_floating_point()]
    assert 0 < len(chosen) < len(tensors) or not part
    folder.save(name, {**tensors, **{key: tensors[key] + 0.01 for key in chosen}}, meta)
    with pytest.raises(ValueError, match=f"reset.json were chosen for other weights; .*{of}"):
        experiment.tune_run(config, corpus, folder, ["reset"])
    with pytest.raises(ValueError, match="chosen for other weights"):
        own_texts.reader_of_run(folder)
    if of == "rule joint":
        with pytest.raises(ValueError, match="chosen for other weights"):
            ship.pretrained_of(folder)
    path.unlink()
    assert experiment.tune_run(config, corpus, folder, ["reset"])["reset"]


def test_a_damaged_file_of_trials_is_named(copied_run):
    """Cut off anywhere; and with a value that is no trial."""
    config, corpus, folder = copied_run
    path = folder.folder / "tuning-carry.json"
    experiment.tune_run(config, corpus, folder, ["carry"])
    content = path.read_text()
    none, rms = (json.loads(content)["trials"][name][0] for name in ("none", "rms"))
    wrong = (
        [1],
        {"none": 3},
        {"none": [3]},
        {"none": [{}]},
        {"none": [none | {"cache": {"theta": 0.0}}]},
        {"none": [none | {"perplexity": "low"}]},
        {"rms": [rms | {"settings": {"rate": None}}]},
    )
    cut = [content[:length] for length in range(0, len(content) - 1, 101)]
    named = [json.dumps({"weights": {}, "trials": each}) for each in wrong]
    for text in [*named, json.dumps([1]), json.dumps({"trials": {}}), *cut]:
        path.write_text(text)
        for mode in ("carry", "reset"):  # the other mode begins at its settings
            with pytest.raises(ValueError, match=r"tuning-carry\.json cannot be read; .*delete it"):
                experiment.tune_run(config, corpus, folder, [mode])


def test_scores_are_those_of_the_chosen_methods(copied_run, synthetic_text):
    config, corpus, folder = copied_run
    models = load_trained(folder, config, corpus.train)
    trials = experiment.tune(config, models, corpus, folder, "reset")
    scored = experiment.score(config, models, trials, corpus.test, folder, "test", "reset")
    methods = comparison_module.compared_methods(trials)
    alone = score_split(models, methods, corpus.test, "reset", ReadingStore(folder.folder / "new"))
    kept = Scores.load(folder.folder / "scores-test-reset.npz")
    assert kept.methods == alone.scores.methods == tuple(method.name for method in methods)
    assert kept.num_words.tolist() == [5 * synthetic_text.num_lines] * 4
    for name in kept.methods:
        np.testing.assert_allclose(kept.nats(name), alone.scores.nats(name), rtol=1e-5)
        assert math.isclose(kept.perplexity(name), scored.scores.perplexity(name))


def test_an_unknown_split(trained_run):
    with pytest.raises(ValueError, match="unknown split; expected valid or test, found 'train'"):
        experiment.evaluate(*trained_run, split="train")


def test_a_model_that_has_not_been_trained(trained_run, tmp_path):
    config, corpus, _ = trained_run
    with pytest.raises(ValueError, match=r"has no 'control' yet; .* --stages control"):
        experiment.evaluate(config, corpus, LanguageRunFolder(tmp_path))
