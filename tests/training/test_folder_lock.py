"""One program at a time in a folder, and whoever died does not hold it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metalm.training import folder_lock
from metalm.training.folder_lock import HOLDER, only_program_in

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from metalm.training.folder_lock import only_program_in
with only_program_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def other_program(folder):
    """A process that holds the folder, killed at the end."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def test_the_message_names_the_process_and_a_killed_one_holds_nothing(tmp_path):
    with other_program(tmp_path / "run") as process:
        message = rf"run is in use; .*found process {process.pid} on \S* \(.*since 2.*--run, --out"
        with pytest.raises(ValueError, match=message), only_program_in(tmp_path / "run"):
            pytest.fail("two programs in one folder")
    assert (tmp_path / "run" / HOLDER).exists()  # left by the killed one
    with only_program_in(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / HOLDER).exists()


def test_what_a_killed_program_left_half_written_goes(tmp_path):
    (tmp_path / "stages").mkdir()
    left = [".base.safetensors.77.partial", ".results.json.123456.partial"]
    # Others write hidden files, too, into a folder that a user names.
    kept = ["base.safetensors", ".mine.partial", "notes.12.partial", ".a.1b.partial", ".tmpAb3dE9"]
    kept += ["stages"]
    for name in (*left, *kept[:-1]):
        (tmp_path / name).touch()
    with only_program_in(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {*kept, ".lock", HOLDER}


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_holder_that_has_not_said_its_name(tmp_path, content):
    with only_program_in(tmp_path):
        if content is None:
            (tmp_path / HOLDER).unlink()
        else:
            (tmp_path / HOLDER).write_text(content)
        with pytest.raises(ValueError, match="found another process;"), only_program_in(tmp_path):
            pytest.fail("two programs in one folder")


def test_an_error_lets_go(tmp_path):
    with pytest.raises(KeyError), only_program_in(tmp_path):
        raise KeyError
    with only_program_in(tmp_path):
        pass


def test_only_folders_that_were_made_for_nothing_go_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "mine/of/a/run"):
        with contextlib.suppress(KeyError), only_program_in(tmp_path / folder):
            raise KeyError
        assert {path.name for path in (tmp_path / "mine").iterdir()} <= {".lock"}
    with only_program_in(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "one" / "configuration.json").touch()
    with only_program_in(tmp_path / "runs" / "two" / "deep"):
        (tmp_path / "runs" / "two" / "beside").touch()
    left = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*")}
    assert left == {"one", "one/.lock", "one/configuration.json", "two", "two/beside"}


def test_another_folder_is_free(tmp_path):
    with only_program_in(tmp_path / "a"), only_program_in(tmp_path / "b"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = "expected a folder to write into"
    with pytest.raises(ValueError, match=message), only_program_in(tmp_path / "file" / "run"):
        pytest.fail("nothing can be held")


def test_a_disk_too_full_for_the_name_lets_go(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(folder_lock, "write_at_once", full)
        with pytest.raises(ValueError, match="room on the disk"), only_program_in(tmp_path):
            pytest.fail("the disk is full")
    with only_program_in(tmp_path):
        pass
