"""One program at a time in a folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from metalm.training.disk import half_written, write_at_once, writing
from metalm.training.processes import first_alone

LOCK = ".lock"
HOLDER = ".lock-holder.json"


@contextmanager
def only_program_in(folder: Path | str) -> Iterator[None]:
    """Holds a folder, made if missing, for as long as the block runs.

    The system itself lets go of the lock of a process that ends in any way, so what a killed one
    leaves behind holds nobody up; files that it left half-written are removed. Of a program's
    several processes the first holds it for all.

    A folder that was made here and in which nothing was written, as where settings are refused, is
    removed again.

    Raises:
        ValueError: another process holds the folder, and the message says which; or the folder
            cannot be written.
    """
    with ExitStack() as held:
        first_alone(lambda: held.enter_context(_only_process_in(Path(folder))))
        yield


@contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{folder} is in use; expected a folder that no other program works in, found "
                f"{_holder(folder)}; wait until it is done, stop it, or choose another folder "
                "(--run, --out)"
            ) from None
    try:
        with writing(folder):
            for left in half_written(folder):
                left.unlink(missing_ok=True)
            write_at_once(folder / HOLDER, json.dumps(_self()))
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
            _remove_empty(made)
        lock.release()


def _remove_empty(made: list[Path]) -> None:
    """Removes folders that hold nothing, innermost first, the lock of the first aside."""
    if made and {path.name for path in made[0].iterdir()} <= {LOCK}:
        (made[0] / LOCK).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def _self() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": platform.node(),
        "command": shlex.join(sys.argv),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _holder(folder: Path) -> str:
    """Who holds the folder, as far as it has said."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return "process {process} on {host} ({command}, since {since})".format_map(found)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
