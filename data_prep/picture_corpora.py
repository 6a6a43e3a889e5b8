"""From a name or a path to prepared pictures on disk."""

from __future__ import annotations

from pathlib import Path

from data_prep.omniglot import PARTS, omniglot_source
from data_prep.once import prepared_once
from data_prep.picture_source import PictureSource, identity, write_pictures
from data_prep.pictures import folder_pictures
from metalm.fewshot.tasks.stored_images import MANIFEST, read_manifest

NAMED = ("omniglot",)


def prepare_pictures(
    source: str,
    *,
    size: int = 28,
    channels: int = 3,
    dark_ink: bool = False,
    root: Path | str = Path("data"),
) -> Path:
    """Prepares pictures, or finds them prepared already.

    Args:
        source: "omniglot", which is downloaded; a folder with its archives or arrays; a folder of
            class folders; or a folder that this function returned.
        size: pixels of a side.
        channels: of class folders: 1 makes pictures grey, 3 keeps colours. What is prepared already
            is taken as it is with the default, and refused where it is not what was asked for;
            Omniglot has one channel.
        dark_ink: of class folders: dark is ink, as on paper; likewise.
        root: folder in which prepared pictures lie.

    Returns:
        The prepared folder, for `metalm.fewshot.tasks.stored_images.open_images`.

    Raises:
        ValueError: unknown source, wrong pictures, or a root that cannot be written.
    """
    if (Path(source) / MANIFEST).is_file():
        return _prepared(Path(source), size, channels=channels, dark_ink=dark_ink)
    root = Path(root)
    found = find_pictures(source, root, channels=channels, dark_ink=dark_ink)
    return prepared_once(
        root,
        f"{found.name}-{size}",
        identity(found, size),
        read_manifest,
        lambda folder: write_pictures(found, folder, size),
    )


def find_pictures(source: str, root: Path, *, channels: int, dark_ink: bool) -> PictureSource:
    """The pictures that a name or a path stands for.

    Raises:
        ValueError: it is neither; the message says what could be.
    """
    path = Path(source)
    if source in NAMED and not path.is_dir():
        return omniglot_source(None, root / "omniglot-archives")
    if not path.is_dir():
        raise ValueError(
            f"unknown pictures; expected {', '.join(NAMED)}, a folder with Omniglot's archives or "
            f"arrays, or a folder of class folders, found {source!r}; check the spelling or the "
            "path"
        )
    if any((path / f"images_{part}{end}").exists() for part in PARTS for end in (".zip", ".npz")):
        return omniglot_source(path, path)
    return folder_pictures(path, channels=channels, dark_ink=dark_ink)


def _prepared(folder: Path, size: int, *, channels: int, dark_ink: bool) -> Path:
    identity = read_manifest(folder)["identity"]
    if identity["size"] != size:
        raise ValueError(
            f"{folder} holds pictures of another size; expected {size} pixels, found "
            f"{identity['size']}; ask for that size, or give the pictures themselves"
        )
    recorded = identity["source"]  # Omniglot's says nothing of these: there is one way to read it
    grey = channels == 1 and recorded.get("channels", 1) != 1
    if grey or (dark_ink and not recorded.get("dark_ink", True)):
        raise ValueError(
            f"{folder} holds pictures that were read in another way; expected {channels} channels, "
            f"dark ink {dark_ink}, found {recorded['channels']}, {recorded['dark_ink']}; leave "
            "these options out, or give the pictures themselves"
        )
    return folder
