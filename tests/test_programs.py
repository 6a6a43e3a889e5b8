"""The programs at the root, from the command line's words to the report, on a few own texts."""

import base64
import contextlib
import importlib.util
import io
import json
import math
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from metalm.language.text.vocabulary import learn_bpe
from metalm.training import precision

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the", "a", "cat", "dog", "sees", "runs", "and", "old", "house", "tree")
SMALL = (
    "--data.vocabulary-size=300",
    "--model.embedding-size=4",
    "--model.hidden-size=6",
    "--base.tokens=120",
    "--base.rows=2",
    "--base.window=10",
    "--rule.tokens=60",
    "--rule.rows=2",
    "--rule.segment=5",
    "--rule.unroll=2",
    "--joint.tokens=60",
    "--joint.rows=2",
    "--joint.segment=5",
    "--joint.unroll=2",
    "--tuning.articles=2",
    "--tuning.tokens=20",
    "--tuning.segments=5",
    "--tuning.rule-segments=5",
    "--tuning.rows=2",
    "--evaluation.rows=2",
)


def program(name):
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train():
    return program("train")


@pytest.fixture(scope="module")
def evaluate():
    return program("evaluate")


@pytest.fixture(scope="module")
def own_text(tmp_path_factory):
    """Twelve files of made-up sentences; one of a single word."""
    folder = tmp_path_factory.mktemp("own") / "texts"
    folder.mkdir()
    random = np.random.default_rng(2)
    for number in range(12):
        lines = (" ".join(random.choice(WORDS, 5)) for _ in range(2 + number))
        (folder / f"text {number}.txt").write_text("\n".join(lines) + "\n")
    (folder / "one word.md").write_text("cat\n")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(train, own_text, tmp_path_factory):
    """What `train.py --data FOLDER` leaves and prints: its folder, arguments and words."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["--data", str(own_text), "--preset", "tiny", "--run", "run", *SMALL]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        assert train.main(arguments) == 0
    return folder, arguments, printed.getvalue()


@pytest.fixture
def in_trained(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    return trained[0] / "run"


def test_from_own_text_to_the_report(trained, in_trained):
    _, _, printed = trained
    assert "report: run/report-test/report.md" in printed
    for name in ("static", "cache", "metalm", "dynamic evaluation"):
        assert name in printed
    report = in_trained / "report-test"
    results = json.loads((report / "results.json").read_text())
    assert finite(results)
    assert (report / "report.md").exists()
    assert list((report / "plots").glob("*.png"))
    page = (report / "report.html").read_text(encoding="utf-8")
    figures = re.search('id="figure-data">([^<]*)<', page)[1]
    drawn = json.loads(zlib.decompress(base64.b64decode(figures)))["reset"]
    assert {"gain_by_position", "recorded_distance"} <= {chart["name"] for chart in drawn}
    for name in ("base", "control", "rule", "joint"):
        assert (in_trained / f"{name}.safetensors").exists()
        assert (in_trained / f"stages/{name}/metrics.jsonl").exists()


def test_nothing_is_done_twice(train, evaluate, trained, in_trained):
    """Neither trained, tuned nor read; and the numbers are the same."""
    kept = [*in_trained.glob("*.safetensors"), *in_trained.glob("readings/*/*.safetensors")]
    written = {path: path.stat().st_mtime_ns for path in kept}
    tuned = (in_trained / "tuning-reset.json").read_bytes()
    results = in_trained / "report-test/results.json"
    before = json.loads(results.read_text())["modes"]["reset"]["methods"]
    assert train.main(trained[1]) == 0
    assert evaluate.main(["run", "--modes", "reset"]) == 0
    assert json.loads(results.read_text())["modes"]["reset"]["methods"] == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (in_trained / "tuning-reset.json").read_bytes() == tuned


def test_another_configuration_does_not_fit_the_folder(train, trained, in_trained, capsys):
    assert train.main([*trained[1], "--seed=5"]) == 2
    assert "belongs to another run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_scored_under_temperatures(evaluate, trained, tmp_path, monkeypatch, capsys):
    """Said, printed and written; the rest of the results is what it was."""
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    results = Path("run/report-test/results.json")
    before = json.loads(results.read_text())
    words = ["run", "--modes", "reset", "--temperatures", "0.5", "1", "2"]
    assert evaluate.main(words) == 0
    after, printed = json.loads(results.read_text()), capsys.readouterr()
    assert "With a temperature tuned on validation: reset" in printed.out
    assert "temperature (reset) of static: " in printed.err
    assert after["modes"] == before["modes"]
    assert not set(before["schema"]) >= set(after["schema"])
    rows = {row["method"]: row for row in after["tempered"]["reset"]}
    assert {"static", "cache", "metalm", "metalm + cache"} <= set(rows)
    for row in rows.values():
        assert row["temperature"] in (0.5, 1.0, 2.0)
        summary = {each["method"]: each for each in before["modes"]["reset"]["summary"]}
        assert row["perplexity_at_1"] == pytest.approx(summary[row["method"]]["perplexity"])
    assert evaluate.main(["run", "--temperatures", "0"]) == 2
    assert "a temperature divides the logits" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["awd-lstm", "awd-lstm-1cycle", "awd-qrnn", "awd-qrnn-1cycle"])
def test_a_published_recipe_at_a_tiny_size(train, own_text, here, preset):
    """Every stage of it, from the command line; whole words, and all articles for the base."""
    small = [word for word in SMALL if "vocabulary-size" not in word]
    published = ["--awd.epochs=3", "--awd.rows=2", "--awd.window=9", "--awd.validation-rows=1"]
    words = ["--preset", preset, "--data", str(own_text), "--run", "run", "--no-evaluation"]
    assert train.main([*words, *small, *published]) == 0
    metrics = Path("run/stages/base/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert any("validation_loss" in line["values"] for line in lines)
    vocabulary = json.loads(Path("run/vocabulary/vocabulary.json").read_text())
    assert vocabulary["kind"] == "word"
    for name in ("base", "control", "rule", "joint"):
        assert Path(f"run/{name}.safetensors").exists()


def test_another_text_is_read_with_the_tokenizer_of_the_run(evaluate, in_trained):
    other = in_trained.parent / "other texts"
    other.mkdir()
    for number in range(4):
        (other / f"{number}.txt").write_text("the old zebra sees a house\n" * (2 + number))
    own = (in_trained / "report-test/results.json").read_bytes()
    assert evaluate.main(["run", "--data", "other texts", "--modes", "reset"]) == 0
    (report,) = set(in_trained.glob("report-*")) - {in_trained / "report-test"}
    results = json.loads((report / "results.json").read_text())
    assert finite(results)
    assert (in_trained / "report-test/results.json").read_bytes() == own


def test_single_texts_are_scored_as_a_corpus_of_them_is(evaluate, in_trained, capsys):
    """The test article of a corpus, given as a file: every method pays the same for it."""
    corpus = in_trained.parent / "three texts"
    corpus.mkdir()
    for number in range(3):
        (corpus / f"{number}.md").write_text("a cat sees <b> the old zebra\n" * (3 + number))
    assert evaluate.main(["run", "--data", "three texts", "--modes", "reset"]) == 0
    (report,) = in_trained.glob("report-three-texts*")
    expected = json.loads((report / "results.json").read_text())["modes"]["reset"]
    (article,) = expected["articles"]
    capsys.readouterr()
    assert evaluate.main(["run", "--text", f"three texts/{article['title']}.md"]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page == Path(f"run/report-text-{article['title']}/report.html")
    found = json.loads(page.with_name("results.json").read_text())["modes"]["reset"]
    assert set(found["methods"]) <= set(expected["methods"])
    assert {"static", "dynamic evaluation (RMS)", "metalm", "metalm + cache"} <= set(
        found["methods"]
    )
    (scored,) = found["articles"]
    assert scored["num_words"] == article["num_words"]
    for method in found["methods"]:
        assert scored["perplexity"][method] == pytest.approx(article["perplexity"][method])
    assert "<b>" not in page.read_text(encoding="utf-8").split("<script")[0]


def test_single_texts_need_neither_tuning_nor_the_training_text(
    evaluate, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for path in [*Path("run").glob("tuning-*"), *Path("run").glob("statistics-*")]:
        path.unlink()
    for number in range(2):
        Path(f"{number}.txt").write_text("the old cat\n" * 4)
    assert evaluate.main(["run", "--text", "0.txt", "1.txt", "--out", "here"]) == 0
    found = json.loads(Path("here/results.json").read_text())["modes"]["reset"]
    assert found["methods"] == ["static", "metalm"]
    # Each is read for itself: the second text is no easier for the first.
    first, second = (article["perplexity"] for article in found["articles"])
    assert first == second


def test_single_texts_are_read_with_the_model_of_the_package(evaluate, here):
    Path("own.txt").write_text("The cat sees the dog .\n")
    assert evaluate.main(["--text", "own.txt"]) == 0
    found = json.loads(Path("report-text-own/results.json").read_text())["modes"]["reset"]
    assert found["methods"] == ["static", "metalm", "metalm + cache"]
    assert found["num_words"] == 7
    assert "static is the same model without learning" in page_of("own")


def page_of(name):
    return Path(f"report-text-{name}/report.html").read_text()


def test_ordinary_text_is_read_in_the_form_that_the_model_knows(evaluate, here, capsys):
    """As if it had been written so; with another option as it is."""
    Path("ordinary.txt").write_text('The dog\nsees it, "the\ncat".\n\nIt runs.\n')
    Path("apart.txt").write_text('The dog sees it , " the cat " .\nIt runs .\n')
    for name in ("ordinary", "apart"):
        assert evaluate.main(["--text", f"{name}.txt"]) == 0
        said = "Punctuation stands apart" in capsys.readouterr().err
        assert said == (name == "ordinary") == ("--as-written leaves" in page_of(name))
    one, other = (
        json.loads(Path(f"report-text-{name}/results.json").read_text())["modes"]["reset"]
        for name in ("ordinary", "apart")
    )
    assert one["articles"][0]["perplexity"] == other["articles"][0]["perplexity"]
    assert evaluate.main(["--text", "ordinary.txt", "--as-written", "--out", "as"]) == 0
    found = json.loads(Path("as/results.json").read_text())["modes"]["reset"]
    assert found["num_words"] < one["num_words"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "none.txt"], "none.txt is not a text; expected a file that ends in .txt or"),
        (["--text", "text.pdf"], "found another ending"),
        (["--text", "empty.txt"], "an article is empty"),
        (["nowhere", "--text", "own.txt"], "there is no model 'nowhere'"),
    ],
)
def test_what_is_no_text_or_no_model(evaluate, here, capsys, words, message):
    Path("text.pdf").write_text("a")
    Path("own.txt").write_text("a")
    Path("empty.txt").write_text(" \n")
    assert evaluate.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which run?"),
        (["run", "--out", "x"], "--out goes with --text"),
        (["run", "--as-written"], "--as-written goes with --text"),
        (["run", "--text", "a.txt", "--tune"], "does not go with --tune"),
        (["--text", "a.txt", "--split", "valid", "--data", "b"], "not go with --data, --split"),
        (["--text", "a.txt", "--official-runs", "b"], "does not go with --official-runs"),
        (["run", "--tune", "--bfloat16"], "settings are tuned in float32"),
    ],
)
def test_options_that_do_not_go_together(evaluate, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_another_device_than_the_one_of_the_training(
    evaluate, trained, tmp_path, monkeypatch, capsys
):
    """Trained where this machine cannot: the programs say so, and read on the processor."""
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    path = Path("run/configuration.json")
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "warp"'))
    Path("text.md").write_text("a cat sees the old zebra\n")
    for words in (["run"], ["run", "--text", "text.md"]):
        assert evaluate.main(words) == 2
        assert "cannot use the device 'warp'" in capsys.readouterr().err
        assert evaluate.main([*words, "--device", "cpu"]) == 0
    assert evaluate.main(["run", "--device", "void"]) == 2
    assert "cannot use the device 'void'" in capsys.readouterr().err
    assert evaluate.main(["--text", "text.md", "--device", "void"]) == 2


def test_a_run_scored_in_bfloat16(evaluate, trained, tmp_path, monkeypatch):
    """Nearly the same numbers under names of their own; nothing of float32 is touched."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert evaluate.main(["run", "--bfloat16", "--modes", "reset"]) == 0
    results = [
        json.loads(Path(f"run/report-{name}/results.json").read_text())
        for name in ("test", "test-bfloat16")
    ]
    exact, low = ({row["method"]: row for row in r["modes"]["reset"]["summary"]} for r in results)
    assert exact.keys() == low.keys()
    for name, row in exact.items():
        assert low[name]["perplexity"] == pytest.approx(row["perplexity"], rel=0.01)
        assert low[name]["perplexity"] != row["perplexity"]
    page = Path("run/report-test-bfloat16/report.html").read_text(encoding="utf-8")
    assert "products in bfloat16" in page
    new = {path for path in Path("run").rglob("*") if path.is_file()} - before.keys()
    assert new
    assert all("test-bfloat16" in path.as_posix() for path in new)
    assert {path: path.read_bytes() for path in before if path.name[0] != "."} == {
        path: content for path, content in before.items() if path.name[0] != "."
    }
    Path("text.md").write_text("a cat sees the old zebra\n")
    assert evaluate.main(["run", "--text", "text.md", "--bfloat16"]) == 0
    assert Path("run/report-text-text-bfloat16/report.html").exists()


def test_bfloat16_where_the_hardware_has_none(
    evaluate, train, trained, tmp_path, monkeypatch, capsys
):
    """Said before anything is read, or trained; and the option says how to go on."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: False)
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert train.main([*trained[1][:4], "--run", "new", *SMALL, "--evaluation.bfloat16"]) == 2
    assert "matrix products in bfloat16, found one that would emulate" in capsys.readouterr().err
    assert not Path("new").exists()
    path = Path("run/configuration.json")
    path.write_text(path.read_text().replace('"temperatures"', '"bfloat16": true, "temperatures"'))
    path.write_text(path.read_text().replace(',\n    "bfloat16": false\n', "\n"))
    Path("text.md").write_text("a cat sees the old zebra\n")
    for words in (["run"], ["run", "--text", "text.md"]):
        assert evaluate.main(words) == 2
        assert "leave out --evaluation.bfloat16 (evaluate.py: --no-" in capsys.readouterr().err
    assert evaluate.main(["--text", "text.md", "--bfloat16"]) == 2
    assert evaluate.main(["run", "--text", "text.md", "--no-bfloat16"]) == 0
    assert evaluate.main(["run", "--tune"]) == 0  # in float32 anyway


def test_a_run_whose_vocabulary_is_another_one(evaluate, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    texts = [f"{word} {word}" for word in WORDS]
    learn_bpe(texts, 262).save(Path("run/vocabulary"))
    assert evaluate.main(["run"]) == 2
    assert "has another vocabulary than run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["tuning-reset.json", "readings/test-reset/*.safetensors", "control.safetensors"]
)
def test_a_damaged_file_is_named(evaluate, trained, tmp_path, monkeypatch, capsys, name):
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for path in Path("run").glob(name):
        path.write_bytes(path.read_bytes()[:-40])
    assert evaluate.main(["run", "--modes", "reset"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert path.parent.as_posix() in error
    assert path.suffix in error
    assert "delete it" in error


@pytest.mark.parametrize("name", ["joint", "rule"])
def test_weights_that_were_tuned_and_are_gone(
    evaluate, trained, tmp_path, monkeypatch, capsys, name
):
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Path(f"run/{name}.safetensors").unlink()
    assert evaluate.main(["run", "--modes", "reset"]) == 2
    assert f"the run run has no '{name}' yet; expected" in capsys.readouterr().err


def finite(value):
    if isinstance(value, dict):
        return all(finite(part) for part in value.values())
    if isinstance(value, list):
        return all(finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def test_a_dry_run_prints_the_resolved_configuration(train, here, capsys):
    words = ["--preset", "small", "--dry-run", "--base.rows", "17", "--data", "anything"]
    assert train.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["base"]["rows"] == 17
    assert printed["preset"] == "small"
    assert printed["data"]["source"] == "anything"
    assert train.main(["--dry-run", "--data.vocabulary-size", "900"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["vocabulary_size"] == 900
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("--seed 3", lambda config: config.seed == 3),
        ("--device cuda", lambda config: config.device == "cuda"),
        ("--threads 1", lambda config: config.threads == 1),
        ("--model.hidden-size 512", lambda config: config.model.hidden_size == 512),
        ("--tuning.flush", lambda config: config.tuning.flush),
        ("--tuning.no-flush", lambda config: not config.tuning.flush),
    ],
)
def test_the_settings_that_the_help_names_are_understood(train, capsys, words, read):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert words in " ".join(capsys.readouterr().out.split())
    other = {"--tuning.flush": ["--tuning.no-flush"], "--tuning.no-flush": ["--tuning.flush"]}
    before = other.get(words, [])
    assert not read(train.configure(*train.parse(before)))
    assert read(train.configure(*train.parse([*before, *words.split()])))


def test_what_several_processes_cannot_share(train, evaluate, here, monkeypatch, capsys):
    Path("own.txt").write_text("a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["fewshot", "--data", "sine"]) == 2
    error = "few-shot learning runs in one process; expected one, found 2; start it without torch"
    assert error in capsys.readouterr().err
    options = evaluate.parse(["--text", "own.txt"])
    with pytest.raises(ValueError, match="reading single files runs in one process"):
        evaluate.run(options, "")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--split", "valid"], "--split"),
        (["--data", "elsewhere"], "--data"),
        (["--tune", "--modes", "carry"], "--tune, --modes"),
        (["--temperatures", "0.9"], "--temperatures"),
        (["--no-bfloat16"], "--bfloat16"),
    ],
)
def test_options_that_mean_nothing_for_few_shot_runs_are_refused(
    evaluate, few_shot_run, words, found, capsys
):
    before = {path: path.stat().st_mtime_ns for path in few_shot_run.rglob("*")}
    assert evaluate.main([str(few_shot_run), *words]) == 2
    expected = f"expected --official-runs, --device or --threads, found {found}; leave it out"
    assert expected in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in few_shot_run.rglob("*")} == before


def test_few_shot_runs_are_scored_with_the_threads_that_were_asked_for(
    evaluate, few_shot_run, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert evaluate.main([str(few_shot_run)]) == 0
    assert evaluate.main([str(few_shot_run), "--threads", "3"]) == 0
    assert asked == [1, 3]  # the run's own, then those of the command line
    assert "| from-scratch |" in capsys.readouterr().out


@pytest.fixture
def few_shot_run(train, here, capsys):
    words = ["fewshot", "--task", "sine", "--method", "from-scratch", "--scoring.tasks", "2"]
    assert train.main([*words, "--threads", "1", "--run", str(here)]) == 0
    capsys.readouterr()
    return here / "from-scratch"


def test_presets_follow_the_data(train, here, capsys):
    for words, preset in (([], "tiny"), (["--data", "wikitext-2"], "small")):
        assert train.main([*words, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out)["preset"] == preset


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "huge"], "unknown preset; expected one of tiny, small, awd-lstm"),
        (["--device", "warp"], "cannot use the device 'warp'"),
        (["--data", "wikitext-3"], "unknown corpus; expected python-docs, wikitext-2"),
        (["--data", "."], "there is no text in the folder ."),
        (["--model.vocabulary-size", "7"], "expected --data.vocabulary-size, found --model.voca"),
    ],
)
def test_wrong_words_end_with_status_2_and_a_message(train, here, capsys, words, message):
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_unknown_stage_is_refused_before_anything_starts(train, own_text, here, capsys, more):
    words = ["--data", str(own_text), "--stages", "base", "bass", "--run", "run", *SMALL, *more]
    assert train.main(words) == 2
    printed, error = capsys.readouterr()
    assert "unknown stage; expected some of base, control, rule, joint, found 'bass'" in error
    assert printed == ""
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.colour", "red"], "--model.colour"),
        (["--tuning.segments"], "tuning.segments is empty; expected one value or more"),
        (["--joint.segment", "0"], "joint.segment is too low; expected at least 1"),
        (["--statistics-batches", "0"], "statistics_batches is too low"),
        (["--accumulation", "0"], "accumulation is too low; expected at least 1"),
        (["--tuning.thetas", "0", "0.3"], "theta is a scale; expected"),
        (["--base.learning-rate", "nan"], "impossible base.learning_rate; expected 0 <= "),
        (["--rule.learning-rate", "nan"], "impossible rule.learning_rate"),
        (["--rule.clip", "-1"], "impossible rule.clip"),
        (["--joint.model-learning-rate", "inf"], "impossible joint.model_learning_rate"),
        (["--joint.model-clip", "nan"], "impossible joint.model_clip"),
        (["--awd.clip", "nan"], "impossible awd.clip"),
    ],
)
def test_settings_that_cannot_be(train, here, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, "--dry-run"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a run; expected a readable configuration.json"),
        (["."], "is not the folder of a run"),
    ],
)
def test_evaluating_what_is_no_run(evaluate, here, capsys, words, message):
    assert evaluate.main(words) == 2
    assert message in capsys.readouterr().err


def test_an_empty_article_is_named(train, here, capsys):
    folder = here / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("a b c\n")
    (folder / "empty.txt").write_text(" \n")
    assert train.main(["--data", "texts", *SMALL]) == 2
    assert "an article is empty; expected at least one word" in (error := capsys.readouterr().err)
    assert "empty" in error
