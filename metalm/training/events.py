"""TensorBoard's event files, written as the numbers come.

The writer that comes with torch hands them to a thread, which prints a traceback of its own when
the disk is full.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from metalm.training.disk import GrowingFile

_number = itertools.count()


class Events:
    """One event file.

    Args:
        folder: where TensorBoard looks.
        purge_step: hide what earlier files of the folder have from this step on; None: nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # Imported late: only a run that writes needs them.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = Event
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}.{next(_number)}"
        self._file = GrowingFile(folder / name)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds one number."""
        self._add(step=step, summary={"value": [{"tag": name, "simple_value": value}]})

    def flush(self) -> None:
        """Brings everything to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
