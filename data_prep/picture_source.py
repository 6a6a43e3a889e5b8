"""Pictures before they are prepared: what every set of pictures supplies, and how it is written.

The manifest is written last and atomically: its presence means success. One class is in memory at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from metalm.fewshot.tasks.stored_images import FORMAT, LABELS, MANIFEST, PICTURES
from metalm.training.disk import file_checksum, write_at_once, writing

Reading = Callable[[int], NDArray[np.uint8]]
"""From the pixels of a side wanted to uint8 [pictures, channels, side, side] with ink = 255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureClass:
    """One class of pictures, read when it is its turn."""

    name: str
    """Unlike that of any other class."""
    count: int
    """Pictures that `read` gives."""
    read: Reading
    """Reads them."""
    group: str | None = None
    """Its alphabet, say; for all classes or for none."""
    part: str | None = None
    """Its part of the data set, say "background"; for all classes or for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSource:
    """A set of pictures, ready to be read."""

    name: str
    """Short name."""
    identity: Mapping[str, Any]
    """What decides whether a prepared folder is of these very pictures (JSON)."""
    classes: Sequence[PictureClass]
    """In the order in which they are numbered."""
    channels: int
    """1 for grey, 3 for colours."""


def write_pictures(source: PictureSource, folder: Path, size: int) -> dict[str, Any]:
    """Writes prepared pictures, replacing what an unfinished preparation left in the folder.

    Args:
        source: the pictures.
        folder: created if need be; `metalm.fewshot.tasks.stored_images.open_images` reads it.
        size: pixels of a side.

    Returns:
        The manifest.

    Raises:
        ValueError: a picture cannot be read, or the disk is full or cannot be written.
    """
    total = sum(each.count for each in source.classes)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        pictures = np.lib.format.open_memmap(
            folder / PICTURES, "w+", np.uint8, (total, source.channels, size, size)
        )
        start = 0
        for each in tqdm(source.classes, desc=source.name, unit="class", disable=None):
            pictures[start : start + each.count] = each.read(size)
            start += each.count
        pictures.flush()
        del pictures  # unmap before reading it again
        counts = [each.count for each in source.classes]
        np.save(folder / LABELS, np.repeat(np.arange(len(counts)), counts))
        manifest = {
            "format": FORMAT,
            "kind": "pictures",
            "name": source.name,
            "identity": identity(source, size),
            "classes": [
                {
                    "name": each.name,
                    "pictures": each.count,
                    **({} if each.group is None else {"group": each.group}),
                    **({} if each.part is None else {"part": each.part}),
                }
                for each in source.classes
            ],
            "files": {
                name: {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": file_checksum(folder / name),
                }
                for name in (PICTURES, LABELS)
            },
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        write_at_once(folder / MANIFEST, text + "\n")
    return manifest


def identity(source: PictureSource, size: int) -> dict[str, Any]:
    """What tells one prepared folder from another: the pictures and their size (JSON)."""
    return {"source": {"name": source.name, **source.identity}, "size": size}
