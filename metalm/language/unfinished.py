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

    Several processes keep nothing: they begin their readings again.

    Args:
        path: the file; its folder is made when something is first kept.
        description: everything that the reading depends on, as JSON values.
        every: seconds between two times.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], every: float = EVERY) -> None:
        self.path, self._description, self._every = path, dict(description), every
        self._due = time.monotonic() + every

    def found(self) -> Any:
        """The tree that was kept; None if there is none, or it is of another reading.

        Raises:
            ValueError: the file is truncated or altered.
        """
        if processes.count() > 1 or not self.path.exists():
            return None
        tensors, meta = checkpoint.load(self.path)
        return unpack(tensors, meta) if meta.get("description") == self._description else None

    def keep(self, tree: Callable[[], Any]) -> None:
        """Keeps what `tree` gives (see `pack`), if it is time to."""
        if processes.count() > 1 or time.monotonic() < self._due:
            return
        tensors, meta = pack(tree())
        checkpoint.save(self.path, tensors, meta | {"description": self._description})
        self._due = time.monotonic() + self._every

    def forget(self) -> None:
        """Removes the file, once the reading is finished."""
        if processes.is_first():
            self.path.unlink(missing_ok=True)
