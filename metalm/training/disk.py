"""What a disk refuses, said clearly; and files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_ROOM = (
    "room on the disk",
    "make room and repeat the command, which goes on from what is saved",
)
_PLACE = (
    "a folder to write into",
    "choose another place (--run, --out), or make it writable",
)
_SIZE = ("files of that size to be allowed", "raise the limit (ulimit -f) and repeat the command")
_DISK = ("a disk that works", "check it and repeat the command")

_PARTIAL = re.compile(r"\..+\.\d+\.partial")

# What was expected, and what to do, by the number of the system's error.
_REFUSALS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _PLACE,
    errno.EPERM: _PLACE,
    errno.EROFS: _PLACE,
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.EEXIST: _PLACE,
    errno.ENAMETOOLONG: _PLACE,
    errno.EFBIG: _SIZE,
    errno.EIO: _DISK,
}


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns what the system refuses inside into one message; other errors pass as they are.

    Args:
        path: what is written: a file, or the folder that files go to.

    Raises:
        ValueError: the disk is full or fails, or the place cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in _REFUSALS:
            raise
        expected, advice = _REFUSALS[number]
        file = getattr(error, "filename", None)
        where = f" for {file}" if file and Path(file) != Path(path) else ""
        raise ValueError(
            f"{path} cannot be written; expected {expected}, found '{os.strerror(number)}'{where}; "
            f"{advice}"
        ) from error


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def half_written(folder: Path) -> list[Path]:
    """What killed programs left in a folder under `partial_of`; other hidden files are not ours."""
    return [left for left in folder.glob(".*.partial") if _PARTIAL.fullmatch(left.name)]


def write_at_once(path: Path, content: str) -> None:
    """Writes a text file so that the path holds the old one or the new one, never a part.

    Raises:
        OSError: what the system refuses; the old file is as it was.
    """
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class GrowingFile:
    """A file that is only ever added to, without a buffer.

    What the disk refuses is so told at once, and not again when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, content: bytes) -> None:
        """Adds all of it; where the disk is full, a part may have been added."""
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]

    def flush(self) -> None:
        """Brings everything to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in its words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
