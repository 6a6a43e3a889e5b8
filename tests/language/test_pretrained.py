"""A trained model saved and loaded: bit for bit, in half precision, on the hub, and from a run."""

import argparse
import dataclasses
import errno
import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from metalm.language import compact, pretrained, pretrained_files, ship
from metalm.language.pretrained import Pretrained
from metalm.language.pretrained_config import ReadingSettings
from metalm.language.reading.article_starts import train_article_starts
from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.reader import Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import score_split
from metalm.language.text.vocabulary import closed_words
from metalm.language.tuning.trials import Trial, trial_to_json
from metalm.meta.rules import LearnedRates
from metalm.meta.rules.kinds import learned_rule

ROOT = Path(__file__).resolve().parents[2]
SCALES = {"rate_scale": 1.3, "decay_scale": 0.6, "surprise": 0.4}
CACHE = CacheConfig(theta=0.5, share=0.2, window=20)
BEST = Trial(
    segment=5,
    settings=SCALES,
    perplexity=19.0,
    cached_perplexity=18.0,
    cache=CACHE,
    seconds=1.0,
)


@pytest.fixture(scope="module")
def tuned_run(trained_run, tmp_path_factory):
    """A copy of a trained run with two trials of its joint model."""
    folder = LanguageRunFolder(tmp_path_factory.mktemp("shipping") / "run")
    shutil.copytree(trained_run[2].folder, folder.folder)
    trials = [
        Trial(
            segment=4,
            settings={"rate_scale": 1.0, "decay_scale": 1.0},
            perplexity=20.0,
            cached_perplexity=17.0,
            cache=CACHE,
            seconds=1.0,
        ),
        BEST,
    ]
    stored = {"weights": {}, "trials": {"joint": [trial_to_json(trial) for trial in trials]}}
    (folder.folder / "tuning-reset.json").write_text(json.dumps(stored))
    return folder


@pytest.fixture(scope="module")
def model(tuned_run):
    return ship.pretrained_of(tuned_run)


@pytest.fixture(scope="module")
def text(trained_run):
    return trained_run[1].test[0].text


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def numbers(found):
    return {
        **{f"model {name}": tensor for name, tensor in found.model.state_dict().items()},
        **{f"rule {name}": tensor for name, tensor in found.rule.state_dict().items()},
    }


def test_a_run_becomes_a_model_with_its_tuned_settings(model, tuned_run, trained_run):
    config, corpus, _ = trained_run
    assert model.config.reset == ReadingSettings(
        segment=5, settings=SCALES, cache=CACHE, perplexity=19.0, cached_perplexity=18.0
    )
    assert model.config.carry == model.config.reset
    assert model.config.origin.seed == config.seed
    assert model.vocabulary.checksum == corpus.vocabulary.checksum
    tensors, _ = tuned_run.load("joint")
    assert torch.equal(model.model.embedding.weight, tensors["model.embedding.weight"])


def test_every_bit_comes_back(model, saved, text):
    loaded = Pretrained.from_pretrained(saved)
    expected = numbers(model)
    found = numbers(loaded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert loaded.config == model.config
    assert loaded.vocabulary.checksum == model.vocabulary.checksum
    assert loaded.model.decoder.weight is loaded.model.embedding.weight
    tokens = model.encode(text)
    before, after = model.reader().read(tokens).nats, loaded.reader().read(tokens).nats
    np.testing.assert_array_equal(before, after)


def test_it_reads_as_the_evaluation_does(model, trained_run, tmp_path):
    articles = trained_run[1].test
    loaded_rule = model.trained_models().rule(model.methods()[1])
    names = model.trained_models().fast_names(model.methods()[1])
    reader = Reader(model.model, loaded_rule, names, 5, surprise=0.4)
    expected = reader.read([a.tokens for a in articles], 2)
    for article, nats in zip(articles, expected.nats, strict=True):
        np.testing.assert_array_equal(model.encode(article.text), article.tokens)
        reading = model.reader().read(article.tokens)
        np.testing.assert_allclose(reading.nats, nats, rtol=1e-4)
    scored = score_split(
        model.trained_models(), model.methods(), articles, "reset", ReadingStore(tmp_path)
    )
    assert scored.scores.methods == ("static", "metalm", "metalm + cache")
    first = scored.scores.articles[0].losses["metalm"]
    words = articles[0].words
    np.testing.assert_allclose(first, np.bincount(words, expected.nats[0]), rtol=1e-4)


@pytest.fixture(scope="module")
def flushing_model(tuned_run, trained_run, tmp_path_factory):
    """The same run, tuned with a flush in the carry-on mode as well."""
    folder = LanguageRunFolder(tmp_path_factory.mktemp("flushing") / "run")
    shutil.copytree(tuned_run.folder, folder.folder)
    config, corpus, _ = trained_run
    network = train_article_starts(corpus.train, config.model.vocabulary_size, 1)
    folder.save("article-starts", network.state_dict(), {})
    better = dataclasses.replace(BEST, perplexity=18.5)
    found = {"joint": [trial_to_json(BEST)], "joint-flush": [trial_to_json(better)]}
    stored = {"weights": {}, "trials": found}
    (folder.folder / "tuning-carry.json").write_text(json.dumps(stored))
    return ship.pretrained_of(folder)


def test_a_stream_is_read_with_the_flush_that_was_tuned(flushing_model, trained_run, tmp_path):
    assert flushing_model.config.carry.flush
    assert not flushing_model.config.reset.flush
    flushing_model.save_pretrained(tmp_path / "saved", torch.bfloat16)
    loaded = Pretrained.from_pretrained(tmp_path / "saved")
    for name, tensor in flushing_model.starts.state_dict().items():
        assert torch.equal(loaded.starts.state_dict()[name], tensor)
    assert "where the text shows that an article begins" in (
        tmp_path / "saved/README.md"
    ).read_text(encoding="utf-8")
    models, (_, method, _) = flushing_model.trained_models(), flushing_model.methods("carry")
    assert method.name == "metalm, flushing"
    rule = models.rule(method)
    assert isinstance(rule, Flushing)
    stream = np.concatenate([article.tokens for article in trained_run[1].test])
    names = models.fast_names(method)
    expected = Reader(flushing_model.model, rule, names, 5, surprise=0.4).read([stream])
    found = flushing_model.reader("carry").read(stream).nats
    np.testing.assert_allclose(found, expected.nats[0], rtol=1e-4)
    plain = Reader(flushing_model.model, rule.inner, names, 5, surprise=0.4).read([stream])
    assert abs(plain.nats[0] - expected.nats[0]).max() > 0.01  # it did flush


def test_settings_that_flush_need_what_tells_where(flushing_model, tmp_path):
    without = dataclasses.replace(flushing_model, starts=None)
    with pytest.raises(ValueError, match="nothing tells where articles begin; expected starts"):
        without.reader("carry")
    without.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="do not fit each other; expected what tells where"):
        Pretrained.from_pretrained(tmp_path / "without")


def test_half_precision_rounds_and_no_more(model, tmp_path, text):
    model.save_pretrained(tmp_path / "half", torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    loaded = Pretrained.from_pretrained(tmp_path / "half")
    for name, weight in model.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), weight.bfloat16().float())
    for name, parameter in model.rule.named_parameters():
        assert torch.equal(loaded.rule.get_parameter(name), parameter)
    tokens = model.encode(text)
    whole, half = model.reader().read(tokens).nats, loaded.reader().read(tokens).nats
    assert whole.mean() == pytest.approx(half.mean(), rel=5e-3)
    np.testing.assert_allclose(half, whole, rtol=0.05)
    files = {kind: load_file(tmp_path / kind / "model.safetensors") for kind in ("half", "whole")}
    for name, tensor in files["whole"].items():
        if name.startswith("model."):
            assert 2 * files["half"][name].nbytes == tensor.nbytes
    assert any("relative_rms" in name for name in files["whole"])
    assert not any("relative_rms" in name for name in files["half"])
    steps = [tensor for name, tensor in files["half"].items() if name.endswith(":steps")]
    assert sum(tensor.nbytes for tensor in steps) < 0.2 * sum(
        tensor.nbytes for name, tensor in files["whole"].items() if ".rms/" in name
    )
    loaded.save_pretrained(tmp_path / "again", torch.bfloat16)
    again = load_file(tmp_path / "again/model.safetensors")
    for name, tensor in load_file(tmp_path / "half/model.safetensors").items():
        if name.startswith("model."):
            assert torch.equal(again[name], tensor)


class Statistics(torch.nn.Module):
    """What a rule keeps of the gradients, in several shapes."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(f"rms/{name}", tensor)


def test_statistics_in_four_bits():
    generator = torch.Generator().manual_seed(2)
    shapes = {"odd": (7, 5), "even": (3, 8), "deep": (2, 3, 4), "one": (4, 1), "bias": (6,)}
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.7 - 6).exp()
        for name, shape in shapes.items()
    } | {"constant": torch.full((3, 4), 2e-3), "zero": torch.zeros(2, 4)}
    empty = torch.nn.Identity()
    stored = compact.compact(empty, Statistics(tensors))
    assert stored["rule.rms/odd:steps"].shape == (7, 3)
    assert stored["rule.rms/odd:steps"].dtype == torch.uint8
    back = Statistics({name: torch.ones_like(tensor) for name, tensor in tensors.items()})
    compact.restore(empty, back, stored)
    for name, tensor in tensors.items():
        found = back.get_buffer(f"rms/{name}")
        if name == "bias":
            assert torch.equal(found, tensor)
            continue
        rows = tensor.clamp(min=1e-30).flatten(1).log()
        spread = rows.amax(1) - rows.amin(1)
        error = (found.clamp(min=1e-30).flatten(1).log() - rows).abs().amax(1)
        assert (error <= spread / 30 + 1e-4).all(), name  # half of a fifteenth


@pytest.mark.parametrize("kind", ["rates", "gated", "lstm"])
def test_every_kind_of_rule_keeps_what_it_learned(kind):
    torch.manual_seed(7)
    rms = {"a.weight": torch.rand(6, 5) * 1e-3 + 1e-4, "a.bias": torch.rand(6) * 1e-3}

    def build(statistics):
        rates = LearnedRates.from_krause(statistics, 2e-4, 1e-3, 5e-4, "row")
        return learned_rule(kind, rates).requires_grad_(False)

    rule = build(rms)
    for parameter in rule.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    empty, fresh = torch.nn.Identity(), build({n: torch.ones_like(t) for n, t in rms.items()})
    compact.restore(empty, fresh, compact.exact(empty, rule))
    for name, tensor in rule.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    rounded = build({n: torch.ones_like(t) for n, t in rms.items()})
    compact.restore(empty, rounded, compact.compact(empty, rule))
    for name, parameter in rule.named_parameters():
        assert torch.equal(rounded.get_parameter(name), parameter)
    for name, buffer in rule.named_buffers():
        torch.testing.assert_close(rounded.get_buffer(name), buffer, rtol=0.12, atol=0)


def test_files_in_the_manner_of_the_hub(model, saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocabulary.json",
        "README.md",
    }
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "metalm"
    assert card.data.license == "apache-2.0"
    assert "Seed 3." in card.text
    assert model.config.origin.command in card.text
    assert "segments of 5 tokens, decay_scale 0.6, rate_scale 1.3" in card.text
    assert "19.00, with the cache 18.00" in card.text
    model.save_pretrained(saved, torch.bfloat16)  # over what was there
    Pretrained.from_pretrained(saved)


def damage(name, change):
    def apply(folder):
        change(folder / name)

    return apply


def edit(**changes):
    def apply(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage("config.json", Path.unlink), r"holds no saved model; expected a readable config"),
        (damage("config.json", lambda p: p.write_text("{")), "holds no saved model"),
        (damage("config.json", lambda p: p.write_text("[]")), "holds no model of metalm"),
        (
            damage("config.json", lambda p: p.write_text('{"model_type": "gpt2"}')),
            r"found None \(model_type gpt2\); pass a folder that save_pretrained wrote",
        ),
        (damage("config.json", edit(rule=3)), "cannot be understood"),
        (damage("config.json", edit(model={"colour": "red"})), "unknown setting model.colour"),
        (damage("config.json", edit(model={"hidden_size": 0})), "cannot be understood"),
        (
            damage("config.json", edit(model={"embedding_size": 3, "hidden_size": 4})),
            r"do not fit each other; expected model.decoder.bias of shape \(6000,\), found \(",
        ),
        (damage("model.safetensors", flip), r"model.safetensors is damaged; expected sha256"),
        (
            damage("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-10])),
            r"model.safetensors is damaged",
        ),
        (damage("tokenizer.json", Path.unlink), r"a file of the model is missing; .*tokenizer"),
        (damage("vocabulary.json", flip), r"vocabulary.json is damaged"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(saved, harm, message):
    harm(saved)
    with pytest.raises(ValueError, match=message):
        Pretrained.from_pretrained(saved)


def test_a_vocabulary_of_another_size(model, tmp_path):
    other = dataclasses.replace(model, vocabulary=closed_words(["a b c"], add_unknown=False))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected a vocabulary of \d+ tokens, found 4"):
        Pretrained.from_pretrained(tmp_path / "other")


def test_nothing_is_there(tmp_path, monkeypatch, model):
    with pytest.raises(ValueError, match="there is no model 'nowhere'; expected a folder"):
        Pretrained.from_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"there is no model 'somebody/something'; .*hub, found"):
        Pretrained.from_pretrained("somebody/something", cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(ValueError, match="this copy of metalm carries no model; expected one in"):
        Pretrained.from_pretrained("shipped")
    with pytest.raises(
        ValueError, match=r"expected torch.float32 or torch.bfloat16, found torch.i"
    ):
        model.save_pretrained(tmp_path, torch.int8)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/folder cannot be written; expected a folder"):
        model.save_pretrained(tmp_path / "file/folder")


def test_up_to_the_hub_and_down_again(model, tmp_path):
    api = mock.create_autospec(HfApi, instance=True)
    api.create_repo.return_value.repo_id = "somebody/reader"

    def upload(*, repo_id, folder_path, commit_message):
        assert repo_id == "somebody/reader"
        shutil.copytree(folder_path, tmp_path / "hub")
        return "https://hub/somebody/reader/commit/1"

    api.upload_folder.side_effect = upload
    with mock.patch("huggingface_hub.HfApi", return_value=api) as made:
        url = model.push_to_hub("reader", private=True, token="secret")
    made.assert_called_once_with(token="secret")
    api.create_repo.assert_called_once_with("reader", private=True, exist_ok=True)
    assert url == "https://hub/somebody/reader/commit/1"
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(tmp_path / "hub")) as get:
        loaded = Pretrained.from_pretrained("somebody/reader", revision="main")
    assert get.call_args.args == ("somebody/reader",)
    assert get.call_args.kwargs["revision"] == "main"
    assert set(get.call_args.kwargs["allow_patterns"]) == {
        path.name for path in (tmp_path / "hub").iterdir()
    }
    for name, tensor in numbers(model).items():
        assert torch.equal(numbers(loaded)[name], tensor)
    assert 'from_pretrained("somebody/reader")' in (tmp_path / "hub" / "README.md").read_text()


def test_the_hub_refuses(model):
    api = mock.create_autospec(HfApi, instance=True)
    api.create_repo.side_effect = PermissionError("you shall not write")
    refused = r"'a/b' cannot be uploaded; .*you shall not write.*hf auth login"
    with (
        mock.patch("huggingface_hub.HfApi", return_value=api),
        pytest.raises(ValueError, match=refused),
    ):
        model.push_to_hub("a/b")


def test_shipping(tuned_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ship, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "shipped")
    run, folder = str(tuned_run.folder), str(tmp_path / "shipped")
    assert ship.main([run, folder, "--limit", "2000"]) == 2
    assert "too large to be shipped; expected at most 2,000 bytes" in capsys.readouterr().err
    assert not (tmp_path / "shipped").exists()
    assert ship.main([run, folder, "--command", "python train.py --mine"]) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "shipped").iterdir())
    assert f"{size:,} bytes" in capsys.readouterr().out
    loaded = Pretrained.from_pretrained("shipped")
    assert loaded.config.origin.command == "python train.py --mine"
    card = (tmp_path / "shipped/README.md").read_text()
    assert 'from_pretrained("shipped")' in card
    assert "python train.py --mine" in card


def test_the_card_has_the_test_figures_of_the_report(tuned_run, tmp_path, capsys):
    folder = LanguageRunFolder(shutil.copytree(tuned_run.folder, tmp_path / "run"))
    report = folder.folder / "report-test" / "results.json"
    report.parent.mkdir()
    lines = [("static", 150.25), ("metalm", 82.5), ("metalm + cache", 79.0)]
    summary = [{"method": name, "perplexity": number} for name, number in lines]
    report.write_text(json.dumps({"modes": {"reset": {"summary": summary}}}))
    model = ship.pretrained_of(folder)
    assert model.config.reset.test_perplexity == 82.5
    assert model.config.reset.test_static_perplexity == 150.25
    assert model.config.carry.test_perplexity is None  # not tuned: it has the settings of reset
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert "without the cache: 82.50;" in card
    assert "150.25" in card
    assert Pretrained.from_pretrained(tmp_path / "saved").config.reset == model.config.reset
    report.write_text('{"modes": {"reset": {}}}')
    assert ship.main([str(folder.folder), str(tmp_path / "other")]) == 2
    assert "results.json is damaged; expected the results of evaluate.py" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_the_model_that_was_there(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    for name in ("save_file", "file_checksum"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrained_files, name, full)
            with pytest.raises(ValueError, match="expected room on the disk"):
                model.save_pretrained(tmp_path, torch.bfloat16)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with monkeypatch.context() as patch:  # while the model is given away: its copy was written
        saves = iter([pretrained_files.save_file, full])
        patch.setattr(pretrained_files, "save_file", lambda *a, **k: next(saves)(*a, **k))
        with pytest.raises(ValueError, match="expected room on the disk"):
            ship.ship(model, tmp_path, torch.bfloat16, 0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unknown_mode(model):
    with pytest.raises(ValueError, match="expected 'reset' or 'carry', found 'carri'; choose one"):
        model.reader("carri")


def test_a_run_that_is_not_tuned(trained_run, capsys):
    assert ship.main([str(trained_run[2].folder), "anywhere"]) == 2
    assert "has no settings for reading; expected the trials of 'joint'" in capsys.readouterr().err


def test_the_command_gives_the_configuration_again(trained_run):
    """Through the command line of train.py itself."""
    spec = importlib.util.spec_from_file_location("train_program", ROOT / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    config = dataclasses.replace(trained_run[0], seed=8, threads=3)
    words = shlex.split(ship.command_of(config))
    assert words[:2] == ["python", "train.py"]
    options, overrides = train.parse(words[2:])
    assert isinstance(options, argparse.Namespace)
    found = train.configure(options, overrides)
    expected = dataclasses.replace(
        config,
        threads=found.threads,
        data=dataclasses.replace(config.data, root=found.data.root),
        model=dataclasses.replace(config.model, vocabulary_size=found.model.vocabulary_size),
    )
    assert found == expected
