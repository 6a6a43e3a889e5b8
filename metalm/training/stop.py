"""Stopping cleanly: Ctrl-C and SIGTERM end a run between two steps, with everything saved."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from metalm.training.processes import is_first


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM: the state is saved; uncaught, it ends the program with 128 + signal."""


class Stop:
    """Notes Ctrl-C and SIGTERM, to stop at the end of a step; a second one stops at once.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._where: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # Python lets only the main thread set handlers; elsewhere the caller has its own way.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """While inside, nothing is unsaved, so a signal need not wait."""
        self._where = where
        try:
            yield
        finally:
            self._where = None

    def leave(self, where: str) -> NoReturn:
        """Say where and raise."""
        name = signal.Signals(self.signal).name
        if is_first():
            print(f"{where} by {name}; all is saved, the same command continues", file=sys.stderr)
        raise Interrupted(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self._where is not None:
            self.leave(self._where)
