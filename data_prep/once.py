"""A prepared folder is made once: found if it is there, and made by one program at a time."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from metalm.training.disk import writing

Manifest = Callable[[Path], dict[str, Any]]


def prepared_once(
    root: Path,
    name: str,
    wanted: dict[str, Any],
    manifest: Manifest,
    write: Callable[[Path], object],
) -> Path:
    """The folder of that identity, written if it is not there.

    Args:
        root: folder in which prepared folders lie.
        name: of the folder; one that holds something else and is finished is left alone, and the
            new one gets a checksum in its name.
        wanted: identity of what is prepared, as JSON values.
        manifest: reads what a finished folder holds; refuses one that is not finished.
        write: fills the folder, its manifest last.

    Raises:
        ValueError: the root cannot be written, or what `write` raises.
    """
    name = re.sub(r"[^\w.-]+", "-", name)
    folder = _place(root, name, wanted, manifest)
    if _recorded(folder, manifest) == wanted:
        return folder
    with one_at_a_time(root, name):
        folder = _place(root, name, wanted, manifest)  # another process may have finished meanwhile
        if _recorded(folder, manifest) != wanted:
            write(folder)
    return folder


@contextmanager
def one_at_a_time(root: Path, name: str) -> Iterator[None]:
    """Holds what is made under that name; what another process makes meanwhile is waited for.

    Args:
        root: folder in which it lies, made if missing; the lock is `.NAME.lock` there.
        name: of the file or folder that is made.

    Raises:
        ValueError: the root cannot be written.
    """
    with writing(root / name):
        root.mkdir(parents=True, exist_ok=True)
        lock = _acquired(FileLock(root / f".{name}.lock"), root / name)
    with lock:
        yield


def _acquired(lock: FileLock, path: Path) -> AcquireReturnProxy:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another program, which prepares {path}", file=sys.stderr)
        return lock.acquire()


def _place(root: Path, name: str, wanted: dict[str, Any], manifest: Manifest) -> Path:
    """The plain name, unless something else that is finished lies there."""
    if _recorded(root / name, manifest) in (None, wanted):
        return root / name
    checksum = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return root / f"{name}-{checksum[:8]}"


def _recorded(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """What a finished folder says it was prepared from; None when it is unfinished or cut short."""
    try:
        found = manifest(folder)
        for name, recorded in found["files"].items():
            if (folder / name).stat().st_size != recorded["bytes"]:
                return None
    except (ValueError, FileNotFoundError):
        return None
    return dict(found["identity"])
