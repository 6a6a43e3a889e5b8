"""Bars that show how far each method has read."""

from __future__ import annotations

from metalm.training.record import Progress


class ReadingProgress:
    """One bar a method, opened when the method begins to read.

    Args:
        title: stands before the method's name.
        total: tokens that each method reads.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._bars: dict[str, Progress] = {}
        self._read: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def __call__(self, name: str, tokens: int, nats: float) -> None:
        """Counts so many tokens more of a method, and their summed loss."""
        if name not in self._bars:
            self._bars[name] = Progress(f"{self._title}: {name}", self._total)
        done, paid = self._read.get(name, (0, 0.0))
        self._read[name] = done + tokens, paid + nats
        mean = (paid + nats) / (done + tokens)
        self._bars[name].update(tokens, tokens=tokens, values={"mean loss": mean})
