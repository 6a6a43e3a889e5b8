"""Bars that show how far reading has come."""

from __future__ import annotations

from collections.abc import Callable

from metalm.training.record import Progress


class ReadingProgress:
    """One bar at a time, opened when methods begin to read.

    Args:
        title: stands before what is read.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Progress | None = None

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, name: str, total: int) -> Callable[[int, float], None]:
        """Opens the bar of a reading; what it gives is told tokens and their nats as they come.

        Args:
            name: who reads.
            total: tokens in all.
        """
        self._close()
        bar = self._bar = Progress(f"{self._title}: {name}", total)
        done, paid = 0, 0.0

        def tell(tokens: int, nats: float) -> None:
            nonlocal done, paid
            done, paid = done + tokens, paid + nats
            bar.update(tokens, tokens=tokens, values={"mean loss": paid / done})

        return tell

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
