"""Prepared pictures on disk, and back; written by the program `data_prep`.

pictures.npy     uint8 [pictures, channels, height, width], ink = 255; memory-mapped
labels.npy       int64 [pictures], class of every picture
manifest.json    source, names, groups and parts of the classes, checksums; written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from metalm.fewshot.tasks.images import LabelledImages
from metalm.training.disk import file_checksum

FORMAT = 1
MANIFEST = "manifest.json"
PICTURES = "pictures.npy"
LABELS = "labels.npy"

_AGAIN = (
    "remove the folder and prepare the pictures again: python train.py fewshot --task omniglot, or "
    "--task and the folder that the pictures came from"
)


def open_images(folder: Path | str) -> LabelledImages:
    """Opens prepared pictures after checking them against their manifest.

    Raises:
        ValueError: no such folder, preparation did not finish, or a file differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in (PICTURES, LABELS):
        _check_file(folder / name, manifest["files"][name])
    classes = manifest["classes"]
    # Copy on write: torch wants arrays that may be written, and nothing reaches the file.
    return LabelledImages(
        np.load(folder / PICTURES, mmap_mode="c"),
        np.load(folder / LABELS),
        [each["name"] for each in classes],
        groups=_column(classes, "group"),
        parts=_column(classes, "part"),
    )


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of prepared pictures, as a dictionary.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"there are no prepared pictures in {folder}; expected {MANIFEST}, which is written "
            f"last, found none; {_AGAIN}"
        ) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(
            f"{path} is damaged; expected the JSON that preparation writes, found "
            f"{type(error).__name__}: {error}; {_AGAIN}"
        ) from error
    keys = {"format", "kind", "identity", "classes", "files"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or keys - set(manifest):
        raise ValueError(
            f"{path} is of another format; expected pictures of format {FORMAT}, found something "
            f"else; {_AGAIN}"
        )
    return manifest


def _check_file(path: Path, recorded: dict[str, Any]) -> None:
    found = file_checksum(path) if path.is_file() else "no file"
    if found != recorded["sha256"]:
        raise ValueError(
            f"{path} is not what its manifest says; expected {recorded['sha256']} as its SHA-256, "
            f"found {found}; {_AGAIN}"
        )


def _column(classes: list[dict[str, Any]], key: str) -> list[str] | None:
    values = [each.get(key) for each in classes]
    return None if None in values else [str(value) for value in values]
