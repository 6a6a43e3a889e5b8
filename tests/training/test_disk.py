"""What the disk refuses is one clear error, and nothing that was there before is lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metalm.training import checkpoint, loop
from metalm.training.disk import GrowingFile, write_at_once, writing
from metalm.training.record import Record, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "expected room on the disk, found 'No space left on device'; make room and"),
        (errno.EDQUOT, "expected room on the disk, found 'Disk quota exceeded'"),
        (errno.EROFS, "expected a folder to write into, found 'Read-only file system'; choose ano"),
        (errno.EACCES, "found 'Permission denied'; choose another place"),
        (errno.EFBIG, "found 'File too large'; raise the limit"),
        (errno.EIO, "found 'Input/output error'; check it"),
    ],
)
def test_each_refusal_says_what_to_do(number, message):
    with (
        pytest.raises(ValueError, match=f"^here/x cannot be written; .*{message}"),
        writing("here/x"),
    ):
        raise OSError(number, "in other words")


def test_the_file_that_was_refused_is_named():
    with pytest.raises(ValueError, match=r"^here cannot .* device' for here/a;"), writing("here"):
        raise OSError(errno.ENOSPC, "full", "here/a")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), ConnectionError("y")])
def test_errors_of_other_kinds_pass(error):
    with pytest.raises(type(error)) as raised, writing("here"):
        raise error
    assert raised.value is error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_device_says_so_once():
    file = GrowingFile(Path("/dev/full"))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            file.write(b"a")
    file.close()


def test_all_of_a_line_is_written_however_little_the_system_takes(tmp_path):
    """A disk that is nearly full takes a part of a write."""

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            return self.file.write(content[:2])

    file = GrowingFile(tmp_path / "x")
    raw, file._file = file._file, Slow(file._file)
    file.write(b"seven..")
    raw.close()
    assert (tmp_path / "x").read_bytes() == b"seven.."


def test_a_text_that_does_not_fit_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_at_once(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_at_once(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


LIMITED = """
import resource, sys, torch
from metalm.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(sys.argv[1], {"a": torch.ones(10_000)}, {"step": 2})
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Unix limits the size of files")
def test_a_checkpoint_that_the_system_refuses_leaves_the_old_one(tmp_path):
    """In a process of its own, whose files may have 20 kB."""
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, {"a": torch.zeros(3)}, {"step": 1})
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{path} cannot be written; expected files of that size")
    tensors, meta = checkpoint.load(path)
    assert (tensors["a"].tolist(), meta) == ([0, 0, 0], {"step": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = "cannot be written; expected a folder to write into"
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "file" / "x.safetensors", {}, {})
    with pytest.raises(ValueError, match=message):
        Record(tmp_path / "file" / "run")


def run(tiny, folder, num_steps=9):
    trained = tiny.Base()
    with Record(folder) as record:
        loop.run(trained, num_steps=num_steps, folder=folder, record=record, save_every_steps=3)
    return trained.state_dict()[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("full_at", ["a checkpoint", "a line", "an event"])
def test_a_disk_that_fills_up_mid_run_stops_it_and_the_same_run_goes_on(
    tiny, tmp_path, monkeypatch, capfd, full_at
):
    """And ends with the same numbers and the same record as a run that nothing stopped."""
    expected = run(tiny, tmp_path / "alone")
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        saves, writes = checkpoint.save_file, GrowingFile.write
        count = []

        def refuse(limit):
            count.append(1)
            if len(count) >= limit:
                raise OSError(errno.ENOSPC, "full")

        def save(*arguments, **named):
            if full_at == "a checkpoint":
                refuse(3)
            saves(*arguments, **named)

        def add(self, content):
            is_line = content.startswith(b"{")
            if is_line == (full_at == "a line") and full_at != "a checkpoint":
                if len(count) == 6:
                    writes(self, content[:4])
                refuse(7)
            writes(self, content)

        patch.setattr(checkpoint, "save_file", save)
        patch.setattr(GrowingFile, "write", add)
        with pytest.raises(ValueError, match="expected room on the disk"):
            run(tiny, folder)
    assert "Traceback" not in capfd.readouterr().err
    before = checkpoint.latest(folder)
    assert before is not None
    checkpoint.load(before)
    found = run(tiny, folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lines = [[line["step"] for line in read(f)] for f in (folder, tmp_path / "alone")]
    assert lines[0] == lines[1] == list(range(1, 10))
    assert not list(folder.glob(".*"))


def test_what_a_killed_save_left_is_removed(tmp_path):
    """Half a file under our name, and one under that of safetensors."""
    checkpoint.save_step(tmp_path, 1, {"a": torch.zeros(1)}, {})
    for name in (".checkpoint-000000002.safetensors.7.partial", ".tmpAb3dE9"):
        (tmp_path / name).write_text("half")
    path = checkpoint.save_step(tmp_path, 2, {"a": torch.zeros(1)}, {})
    assert sorted(tmp_path.iterdir()) == [checkpoint.step_path(tmp_path, 1), path]
