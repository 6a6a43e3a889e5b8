"""train.py, evaluate.py and data_prep on a disk that refuses: one clear error, nothing lost."""

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from data_prep.__main__ import main as prepare
from metalm.analysis import report
from metalm.analysis.statistics import scores
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.training import checkpoint
from metalm.training.folder_lock import only_program_in

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--preset=tiny",
    "--data.vocabulary-size=300",
    "--model.embedding-size=4",
    "--model.hidden-size=6",
    "--base.tokens=120",
    "--base.rows=2",
    "--base.window=10",
    "--joint.tokens=60",
    "--tuning.articles=2",
    "--tuning.tokens=20",
    "--tuning.segments=5",
    "--tuning.rule-segments=5",
    "--evaluation.modes=reset",
)


def program(name):
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


train, evaluate = program("train"), program("evaluate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with base and control, tuned, its text and its prepared data."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "texts").mkdir()
    for number in range(5):
        (folder / f"texts/{number}.txt").write_text("the old cat sees\na dog .\n" * (3 + number))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["--data", "texts", "--run", "run", *SMALL, "--no-evaluation"]
        assert train([*words, "--stages", "base", "control"]) == 0
        assert evaluate(["run", "--modes", "reset", "--tune"]) == 0
    return folder, words


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it to work in, and the words that go on with it."""
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return LanguageRunFolder("run"), trained[1]


def refuse(*arguments, **named):
    raise OSError(errno.ENOSPC, "full")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_error(capsys):
    """The only line that looks like an error; no traceback."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if "cannot be" in line or "in use" in line]
    return line


def test_a_full_disk_in_training(run, monkeypatch, capsys):
    """The next stage cannot be saved; what the stages before it left is as it was."""
    folder, words = run
    before, _ = folder.load("control")
    folder.weights("control").unlink()
    shutil.rmtree(folder.stage("control"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", refuse)
        assert train([*words, "--stages", "control"]) == 2
    assert "expected room on the disk, found 'No space left on device'" in the_error(capsys)
    assert not folder.has("control")
    folder.load("base")
    assert train([*words, "--stages", "control"]) == 0
    after, _ = folder.load("control")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_disk_that_is_full_from_the_start_spoils_nothing(run, monkeypatch, capsys):
    folder, words = run
    before = contents(folder.folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert train([*words, "--stages", "base", "control"]) == 2
    assert the_error(capsys).startswith("error: run cannot be written; expected room on the disk")
    assert {path: contents(folder.folder)[path] for path in before} == before


def test_a_full_disk_in_evaluation(run, monkeypatch, capsys):
    """Whatever was finished before is still there, and the same command ends well."""
    folder, _ = run
    words = ["run", "--modes", "reset"]
    for module, name in (
        (checkpoint, "save_file"),  # a reading
        (scores, "write_at_once"),
        (report, "write_at_once"),
    ):
        before = contents(folder.folder)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            assert evaluate(words) == 2
        assert "cannot be written; expected room on the disk" in the_error(capsys)
        assert {path: contents(folder.folder)[path] for path in before} == before
    assert evaluate(words) == 0
    before = contents(folder.folder / "report-test")
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_at_once", refuse)
        assert evaluate(words) == 2
    assert contents(folder.folder / "report-test") == before


def test_a_full_disk_in_the_evaluation_of_texts(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_at_once", refuse)
        assert evaluate(["run", "--text", "texts/1.txt", "--out", "here"]) == 2
    assert the_error(capsys).startswith("error: here cannot be written; expected room on the disk")
    assert evaluate(["run", "--text", "texts/1.txt", "--out", "here"]) == 0
    assert json.loads(Path("here/results.json").read_text())["modes"]["reset"]


def test_a_read_only_folder(run, monkeypatch, capsys):
    def read_only(*arguments, **named):
        raise OSError(errno.EROFS, "no")

    folder, words = run
    before = contents(folder.folder)
    with monkeypatch.context() as patch:
        patch.setattr("metalm.training.folder_lock.FileLock.acquire", read_only)
        for main, arguments in ((train, words), (evaluate, ["run"])):
            assert main(arguments) == 2
            message = "error: run cannot be written; expected a folder to write into, found 'Read-"
            assert the_error(capsys).startswith(message)
    assert contents(folder.folder) == before


def test_a_run_below_a_file(run, capsys):
    _, words = run
    Path("file").write_text("in the way")
    for main, arguments in (
        (train, [*words, "--run", "file/run"]),
        (evaluate, ["run", "--text", "texts/1.txt", "--out", "file/here"]),
        (train, [*words, "--data.root", "file"]),
    ):
        assert main(arguments) == 2
        assert "cannot be written; expected a folder to write into" in the_error(capsys)


def test_two_programs_in_one_folder(run, capsys):
    folder, training = run
    before = contents(folder.folder)
    with only_program_in("run"):
        for main, arguments in (
            (train, training),
            (evaluate, ["run"]),
            (evaluate, ["run", "--tune"]),
        ):
            assert main(arguments) == 2
            error = the_error(capsys)
            assert error.startswith("error: run is in use; ")
            assert f"found process {os.getpid()} on" in error
        # Texts go to a folder of their own.
        assert evaluate(["run", "--text", "texts/1.txt"]) == 0
    assert {path: contents(folder.folder)[path] for path in before} == before


def test_no_lock_is_left_in_what_is_no_run(run, capsys):
    Path("empty").mkdir()
    assert evaluate(["empty"]) == 2
    assert evaluate(["nowhere"]) == 2
    assert not list(Path("empty").iterdir())
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", ["pa.OSFile", "Dataset.save_to_disk", "write_at_once"])
def test_a_full_disk_in_preparation(run, monkeypatch, capsys, name):
    """What is unfinished goes; what was prepared before stays; the same command ends well."""
    words = ["texts", "--out", "data", "--vocabulary-size", "270"]
    before = contents(Path("data"))
    with monkeypatch.context() as patch:
        patch.setattr(f"data_prep.prepared.{name}", refuse)
        assert prepare(words) == 2
    assert "cannot be written; expected room on the disk" in the_error(capsys)
    assert contents(Path("data")).keys() - before.keys() == {Path("data/.texts-bpe270.lock")}
    assert {path: contents(Path("data"))[path] for path in before} == before
    assert prepare(words) == 0


def test_who_waits_for_a_preparation_is_told(run, monkeypatch, capsys):
    """A lock that is held at first, and free when it is waited for."""
    acquire, timeouts = FileLock.acquire, []

    def held_at_first(self, **named):
        timeouts.append(named.get("timeout"))
        if len(timeouts) == 1:
            raise Timeout("held")
        return acquire(self, **named)

    monkeypatch.setattr(FileLock, "acquire", held_at_first)
    assert prepare(["texts", "--out", "data", "--vocabulary-size", "271"]) == 0
    message = f"waiting for another program, which prepares {Path('data/texts-bpe271')}"
    assert message in capsys.readouterr().err
    assert timeouts == [0, None]
