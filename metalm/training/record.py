"""What a run says about itself: JSON lines, TensorBoard, and a progress bar.

One line of metrics.jsonl is {"kind", "step", "seconds", "values"}: the kind of measurement, the
number of finished steps, the seconds of work since the start (summed over resumed runs) and the
numbers themselves.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from metalm.training.disk import GrowingFile, writing
from metalm.training.events import Events
from metalm.training.processes import is_first


class Record:
    """Appends measurements to folder/metrics.jsonl and to TensorBoard events in the folder.

    One training, one folder: `rewind` cuts what a killed run wrote after its last checkpoint.

    Raises:
        ValueError: here and in the methods, what is written does not fit the disk, or may not be.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._events: Events | None = None
        self._purge_step: int | None = None
        self._wants_events = tensorboard
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = len(_complete_lines(self.path))
            self._cut(self._lines)
            self._file = GrowingFile(self.path)

    @property
    def num_lines(self) -> int:
        """How many measurements have been written; what `rewind` takes back."""
        return self._lines

    def write(self, kind: str, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Append one measurement; numbers must be finite.

        Raises:
            ValueError: a value is not finite.
        """
        refuse_non_finite(values, f"the measurement {kind!r} at step {step}")
        line = {"kind": kind, "step": step, "seconds": round(seconds, 3), "values": dict(values)}
        with writing(self.path):
            self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
            self._lines += 1
            if self._wants_events:
                events = self._open_events()
                for name, value in values.items():
                    events.add_scalar(f"{kind}/{name}", value, step)

    def rewind(self, num_lines: int, step: int) -> None:
        """Keep the first lines only, and hide TensorBoard events past the step."""
        self._file.close()
        with writing(self.path):
            self._cut(num_lines)
            self._lines = min(self._lines, num_lines)
            self._file = GrowingFile(self.path)
        self._purge_step = step + 1

    def flush(self) -> None:
        """Bring everything to the disk, so that a kill loses nothing written before."""
        with writing(self.path):
            self._file.flush()
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_events(self) -> Events:
        if self._events is None:
            self._events = Events(self.path.parent, self._purge_step)
        return self._events

    def _cut(self, num_lines: int) -> None:
        if self.path.exists():
            size = sum(len(line) for line in _complete_lines(self.path)[:num_lines])
            os.truncate(self.path, size)


def read(folder: Path) -> list[dict[str, Any]]:
    """All measurements of a run's folder, in the order of writing."""
    return [json.loads(line) for line in _complete_lines(Path(folder) / "metrics.jsonl")]


def refuse_non_finite(values: Mapping[str, float], where: str, advice: str = "") -> None:
    """Raise a ValueError that names the first value that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is not finite in {where}; expected a number, found {value}"
                + (f"; {advice}" if advice else "; lower the learning rate or check the data")
            )


def _complete_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline; a killed run may have left half a line."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


class Progress:
    """A progress bar with loss and tokens per second on a terminal, else a line now and then.

    The speed is that since the first steps were told: they may be those of an earlier run.
    Of several processes the first shows what it does itself; the others are silent.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        initial: int = 0,
        seconds_between_lines: float = 30.0,
        stream: IO[str] | None = None,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._title = title
        self._total = total
        self._done = initial
        self._between = seconds_between_lines
        self._tokens = 0.0
        self._last_line = time.monotonic()
        self._first: float | None = None  # when the first steps were told, whose time is not known
        self._bar: Any = None
        self._silent = not is_first()
        if self._stream.isatty() and not self._silent:
            self._bar = tqdm(
                total=total, initial=initial, desc=title, file=self._stream, dynamic_ncols=True
            )

    def update(
        self, num_steps: int = 1, *, tokens: float = 0.0, values: Mapping[str, float] | None = None
    ) -> None:
        """Count finished steps and the tokens they read; show the values (for instance loss)."""
        self._done += num_steps
        shown = {name: f"{value:.4g}" for name, value in (values or {}).items()}
        now = time.monotonic()
        if self._first is None:
            self._first = now
        else:
            self._tokens += tokens
        if self._tokens:
            shown["tokens/s"] = f"{self._tokens / max(now - self._first, 1e-9):,.0f}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(num_steps)
        elif self._silent:
            return
        elif now - self._last_line >= self._between or self._done >= self._total:
            self._last_line = now
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self._title}: {self._done}/{self._total} {words}", file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
