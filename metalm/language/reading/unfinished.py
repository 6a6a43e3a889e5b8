"""Readings that were stopped: what they had come to, so that the same command goes on from there.

A stream of articles is one text, which may take longer than a program is allowed to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metalm.training import checkpoint, processes
from metalm.training.state import pack, unpack

EVERY = 120.0
"""Seconds between two times that a reading is kept."""


class Unfinished:
    """Where one reading stands, in a file of its own, written whole and with a checksum.

    Each of several processes has its own file, for its own part of the texts, and goes on only as
    the same one of as many.

    Args:
        path: the file; its folder is made when something is first kept. Of several processes each
            adds to the name which one it is.
        description: everything that the reading depends on, as JSON values.
        every: seconds between two times.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], every: float = EVERY) -> None:
        count, own = processes.count(), processes.rank()
        self.path = path if count == 1 else path.with_stem(f"{path.stem}-{own + 1}-of-{count}")
        self._description, self._every = {**description, "process": [own, count]}, every
        self._due = time.monotonic() + every

    def found(self) -> Any:
        """The tree that was kept; None if there is none, or it is of another reading.

        Raises:
            ValueError: the file is truncated or altered.
        """
        if not self.path.exists():
            return None
        tensors, meta = checkpoint.load(self.path)
        return unpack(tensors, meta) if meta.get("description") == self._description else None

    def keep(self, tree: Callable[[], Any]) -> None:
        """Keeps what `tree` gives (see `pack`), if it is time to."""
        if time.monotonic() < self._due:
            return
        tensors, meta = pack(tree())
        checkpoint.save_own(self.path, tensors, meta | {"description": self._description})
        self._due = time.monotonic() + self._every

    def forget(self) -> None:
        """Removes the file, once the reading is finished."""
        self.path.unlink(missing_ok=True)
