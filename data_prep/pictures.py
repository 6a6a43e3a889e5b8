"""The user's own pictures: a folder of class folders, found by the `imagefolder` of `datasets`.

FOLDER/CLASS/picture.png      or, with groups of classes,      FOLDER/GROUP/CLASS/picture.png
"""

from __future__ import annotations

import glob
import hashlib
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Image as ImageFeature
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from PIL import Image

from data_prep.picture_source import PictureClass, PictureSource
from metalm.fewshot.tasks.resize import resized
from metalm.training.disk import file_checksum


def folder_pictures(folder: Path, *, channels: int = 3, dark_ink: bool = False) -> PictureSource:
    """The pictures below a folder, a class for every folder that holds pictures.

    Pictures are brought to squares without keeping their proportions.

    Args:
        folder: see the head of this file.
        channels: 1 makes them grey, 3 keeps colours.
        dark_ink: dark is ink, as on paper, so that brightness is turned round.

    Raises:
        ValueError: there are no pictures, a picture is in no class folder, or only some classes are
            in groups.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"pictures have 1 or 3 channels; expected one of them, found {channels}; choose one"
        )
    by_class: dict[tuple[str, ...], list[Path]] = {}
    for path in _find_pictures(folder):
        by_class.setdefault(path.relative_to(folder).parts[:-1], []).append(path)
    depths = {len(parts) for parts in by_class}
    if len(depths) != 1 or not depths <= {1, 2}:
        wrong = next((parts for parts in sorted(by_class) if len(parts) not in (1, 2)), None)
        where = "/".join(wrong) or "the folder itself" if wrong is not None else "both"
        raise ValueError(
            f"the pictures in {folder} are not sorted by class; expected every one in CLASS/ or "
            f"every one in GROUP/CLASS/, found some in {where}; move them into class folders"
        )
    digest = hashlib.sha256()
    for parts, paths in sorted(by_class.items()):
        for path in paths:
            digest.update(f"{'/'.join((*parts, path.name))} {file_checksum(path)}\n".encode())
    return PictureSource(
        name=folder.resolve().name or "pictures",
        identity={
            "from": "folder",
            "checksum": digest.hexdigest(),
            "channels": channels,
            "dark_ink": dark_ink,
        },
        classes=[
            PictureClass(
                name="/".join(parts),
                group=parts[0] if len(parts) == 2 else None,
                count=len(paths),
                read=partial(_read, "/".join(parts), paths, channels, dark_ink),
            )
            for parts, paths in sorted(by_class.items())
        ],
        channels=channels,
    )


def _find_pictures(folder: Path) -> list[Path]:
    """Pictures at any depth, in the order of their paths."""
    folder = folder.resolve()
    try:
        with tempfile.TemporaryDirectory() as cache:
            # Named as files and not as a folder: of a folder, `datasets` would take the classes
            # "train" and "test" for splits.
            rows = load_dataset(
                "imagefolder",
                data_files={"train": [f"{glob.escape(str(folder))}/**"]},
                split="train",
                drop_labels=True,
                cache_dir=cache,
            )
            found = list(rows.cast_column("image", ImageFeature(decode=False)))
            del rows  # unmap before the cache is removed
    except (FileNotFoundError, DatasetsError, ValueError) as error:
        raise ValueError(
            f"there are no pictures in {folder}; expected files such as CLASS/picture.png, found "
            f"none ({error}); check the path"
        ) from error
    return sorted(Path(row["image"]["path"]) for row in found)


def _read(
    name: str, paths: list[Path], channels: int, dark_ink: bool, size: int
) -> NDArray[np.uint8]:
    """Pictures of one class, uint8 [pictures, channels, size, size]."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
        except OSError as error:
            raise ValueError(
                f"a picture of the class {name!r} cannot be read; expected a picture, found "
                f"{error} in {path}; replace it or take it away"
            ) from error
        pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        pictures.append(resized(pixels[None], size)[0])
    stacked = np.stack(pictures)
    return 255 - stacked if dark_ink else stacked
