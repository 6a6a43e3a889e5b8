"""Files and pictures of which a killed process, or a full disk, leaves the old one or the new."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metalm.analysis.figures.appearance import new_figure, save_figure
from metalm.analysis.whole_file import write_at_once

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = (".png", ".svg")

# Draws into a folder that has pictures already, and dies as `how` says when a picture has been
# written and is not yet on the disk, or when matplotlib is in the middle of drawing the second.
KILLED = """
import os, signal, sys
from pathlib import Path
from matplotlib.figure import Figure
from metalm.analysis.figures.appearance import new_figure, save_figure

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

def die_while_drawing(figure, file, **named):
    if named.get("format") != "svg":
        return drawn(figure, file, **named)
    file.write(b"<svg") if hasattr(file, "write") else Path(file).write_bytes(b"<svg")
    die()

drawn = Figure.savefig
if sys.argv[2] == "fsync":
    os.fsync = die
else:
    Figure.savefig = die_while_drawing
figure = new_figure(2, 1)
figure.text(0.5, 0.5, "new")
save_figure(figure, Path(sys.argv[1]))
"""


def draw(stem: Path, text: str) -> list[bytes]:
    figure = new_figure(2, 1)
    figure.text(0.5, 0.5, text)
    save_figure(figure, stem)
    return [stem.with_suffix(ending).read_bytes() for ending in ENDINGS]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is Unix's")
@pytest.mark.parametrize(("when", "replaced"), [("fsync", 0), ("drawing", 1)])
def test_a_picture_of_a_killed_process_is_the_old_one_or_the_new(tmp_path, when, replaced):
    old = draw(tmp_path / "plot", "old")
    new = draw(tmp_path / "elsewhere" / "plot", "new")
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "plot"), when],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    found = [(tmp_path / "plot").with_suffix(ending).read_bytes() for ending in ENDINGS]
    assert found == new[:replaced] + old[replaced:]
    assert draw(tmp_path / "plot", "new") == new
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == set(ENDINGS)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_a_full_disk_refuses_leaves_the_old_one(tmp_path, monkeypatch, call):
    path = tmp_path / "made" / "x"
    write_at_once(path, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="full"):
        write_at_once(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
