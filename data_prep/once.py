"""A prepared folder is made once: found if it is there, and made by one program at a time."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from metalm.training.disk import writing

Recorded = Callable[[Path], dict[str, Any] | None]


def prepared_once(
    root: Path,
    name: str,
    wanted: dict[str, Any],
    recorded: Recorded,
    write: Callable[[Path], object],
) -> Path:
    """The folder of that identity, written if it is not there.

    Args:
        root: folder in which prepared folders lie.
        name: of the folder; one that holds something else and is finished is left alone, and the
            new one gets a checksum in its name.
        wanted: identity of what is prepared, as JSON values.
        recorded: identity of a finished folder; None if it is not one.
        write: fills the folder, its manifest last.

    Raises:
        ValueError: the root cannot be written, or what `write` raises.
    """
    name = re.sub(r"[^\w.-]+", "-", name)
    folder = _place(root, name, wanted, recorded)
    if recorded(folder) == wanted:
        return folder
    with writing(folder):
        root.mkdir(parents=True, exist_ok=True)
        lock = _acquired(FileLock(root / f".{name}.lock"), folder)
    with lock:
        folder = _place(root, name, wanted, recorded)  # another process may have finished meanwhile
        if recorded(folder) != wanted:
            write(folder)
    return folder


def _acquired(lock: FileLock, folder: Path) -> AcquireReturnProxy:
    """The lock; what another process prepares meanwhile is waited for, and then used."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another program, which prepares {folder}", file=sys.stderr)
        return lock.acquire()


def _place(root: Path, name: str, wanted: dict[str, Any], recorded: Recorded) -> Path:
    """The plain name, unless something else that is finished lies there."""
    if recorded(root / name) in (None, wanted):
        return root / name
    checksum = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return root / f"{name}-{checksum[:8]}"
