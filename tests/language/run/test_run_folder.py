"""What is kept in a run's folder, and what is refused when it does not fit."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from metalm.language.network.model import ModelConfig
from metalm.language.run.presets import PRESETS, ExperimentConfig, preset_named
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.trained import count_gradients, load_trained
from metalm.training.configuration import from_json


@pytest.fixture
def copied_run(trained_run, tmp_path):
    """A trained run that a test may damage."""
    config, corpus, folder = trained_run
    shutil.copytree(folder.folder, tmp_path / "run")
    return config, corpus, LanguageRunFolder(tmp_path / "run")


def test_a_configuration_survives_json(tmp_path):
    for preset in PRESETS.values():
        config = preset()
        stored = json.loads(json.dumps(dataclasses.asdict(config)))
        assert from_json(ExperimentConfig, stored) == config
    folder = LanguageRunFolder(tmp_path / "new")
    folder.write_configuration(config)
    folder.write_configuration(config)
    assert from_json(ExperimentConfig, folder.read_configuration()) == config


def test_an_unknown_setting_of_another_version():
    stored = json.loads(json.dumps(dataclasses.asdict(ExperimentConfig())))
    stored["model"]["colour"] = "red"
    with pytest.raises(ValueError, match=r"unknown setting model.colour; expected .*hidden_size"):
        from_json(ExperimentConfig, stored)


def test_a_folder_of_another_run(tmp_path):
    folder, config = LanguageRunFolder(tmp_path), ExperimentConfig()
    folder.write_configuration(config)
    other = dataclasses.replace(
        config, seed=8, model=dataclasses.replace(config.model, hidden_size=7)
    )
    message = "other values for model.hidden_size, seed; choose another folder with --run"
    with pytest.raises(ValueError, match=message):
        folder.write_configuration(other)
    assert from_json(ExperimentConfig, folder.read_configuration()) == config


def test_another_number_of_threads_goes_on_with_a_run(tmp_path):
    folder = LanguageRunFolder(tmp_path)
    folder.write_configuration(ExperimentConfig(threads=2))
    before = folder.configuration_path.read_bytes()
    folder.write_configuration(ExperimentConfig(threads=1))
    assert folder.configuration_path.read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "{", "null", "5", "[1]", "{}", "[]"])
def test_a_folder_that_is_no_run(tmp_path, content):
    folder = LanguageRunFolder(tmp_path)
    if content is not None:
        folder.configuration_path.write_text(content)
    with pytest.raises(ValueError, match="is not the folder of a run; expected a readable config"):
        folder.read_configuration()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"model": 5}, "model is damaged; expected settings by name, found 5; restore the file"),
        ({"data": []}, r"data is damaged; expected settings by name, found \[\]"),
        ({"joint": {"rows": "many"}}, "joint is damaged; expected beta|joint is damaged; expected"),
    ],
)
def test_a_damaged_configuration(found, message):
    with pytest.raises(ValueError, match=message):
        from_json(ExperimentConfig, found)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match=r"unknown preset; expected one of tiny, .*, found 'ti'"):
        preset_named("ti")


def test_clusters_need_a_sorted_vocabulary():
    message = "sorted by frequency; expected data.tokenizer word, found bpe; use whole words"
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(model=ModelConfig(cutoffs=(500,)))


def test_trained_weights_are_those_that_were_saved(trained_run):
    config, corpus, folder = trained_run
    models = load_trained(folder, config, corpus.train)
    for name, model in models.models.items():
        tensors, _ = folder.load(name)
        for key, weight in model.state_dict().items():
            assert torch.equal(weight, tensors[f"model.{key}"])
            assert not weight.requires_grad
        assert not model.training
    assert set(models.models) == {"control", "joint"}
    for name, rule in models.rules.items():
        tensors, _ = folder.load(name)
        for key, value in rule.state_dict().items():
            assert torch.equal(value, tensors[f"rule.{key}"])
    assert set(models.rules) == {"rule", "joint"}
    assert set(models.statistics) == set(config.tuning.segments)


def test_statistics_are_worked_out_once(copied_run):
    config, corpus, folder = copied_run
    for segment in config.tuning.segments:
        folder.weights(f"statistics-{segment}").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"has no 'statistics-\d' yet"):
        load_trained(folder, config, None)
    first = load_trained(folder, config, corpus.train).statistics
    second = load_trained(folder, config, None).statistics
    for segment, tensors in first.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[segment][name])


def test_statistics_of_other_weights_are_counted_again(copied_run):
    """As after a training anew; older files, which do not say whose they are, are taken."""
    config, corpus, folder = copied_run
    segment = config.tuning.segments[0]
    before = load_trained(folder, config, corpus.train).statistics[segment]
    tensors, meta = folder.load("control")
    tensors["model.decoder.bias"][0] += 3.0
    folder.save("control", tensors, meta)
    with pytest.raises(ValueError, match=r"statistics-\d+.safetensors is of other weights; expe"):
        load_trained(folder, config, None)
    found = load_trained(folder, config, corpus.train)
    counted, model = found.statistics[segment], found.models["control"]
    expected = count_gradients(config, model, corpus.train, found.rival_names, segment)
    for name, rms in expected.items():
        assert torch.equal(counted[name], rms)
    assert any(not torch.equal(counted[name], before[name]) for name in before)
    folder.save(f"statistics-{segment}", before, {})
    assert torch.equal(load_trained(folder, config, None).statistics[segment][name], before[name])


def test_a_run_without_the_rivals_base(copied_run):
    config, corpus, folder = copied_run
    folder.weights("control").unlink()
    with pytest.raises(ValueError, match=r"has no 'control' yet; expected .*control.safetensors"):
        load_trained(folder, config, corpus.train)


def test_weights_of_another_size(copied_run):
    config, corpus, folder = copied_run
    model = dataclasses.replace(config.model, hidden_size=config.model.hidden_size + 1)
    other = dataclasses.replace(config, model=model)
    message = r"control.safetensors does not fit .*layers.0.\w+ of shape \(\d+,.*found \(\d+,"
    with pytest.raises(ValueError, match=message):
        load_trained(folder, other, corpus.train)


def test_a_rule_of_another_kind(copied_run):
    config, corpus, folder = copied_run
    rule = dataclasses.replace(config.rule, granularity="tensor")
    other = dataclasses.replace(config, rule=rule)
    with pytest.raises(ValueError, match=r"rule.safetensors does not fit the configuration"):
        load_trained(folder, other, corpus.train)


@pytest.mark.parametrize("name", ["control", "joint", "rule"])
def test_truncated_and_altered_weights_are_refused_by_name(copied_run, name):
    config, corpus, folder = copied_run
    path = folder.weights(name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_trained(folder, config, corpus.train)
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} was altered"):
        load_trained(folder, config, corpus.train)
