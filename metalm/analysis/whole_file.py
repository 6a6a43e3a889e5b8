"""Files that are there whole or not at all, wherever the process is killed."""

import os
from pathlib import Path


def write_at_once(path: Path, content: bytes) -> None:
    """Write a file so that the path holds the old one or the new one, never a part.

    The content goes to PATH.partial first, which takes the file's place once it is on the disk.

    Args:
        path: the file; its folder is made if absent.
        content: all of it.

    Raises:
        OSError: what the system refuses; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
