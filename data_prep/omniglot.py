"""Omniglot (Lake et al. 2015): the official archives, downloaded or in a folder, or arrays of them.

1,623 characters of 50 alphabets, each drawn once by 20 people; black strokes on white, 105 x 105
pixels. The background set (30 alphabets, 964 characters) is to learn from, the evaluation set (20
alphabets, 659 characters) to score on. Characters are numbered as their files are, 0001 to 1623,
which is nearly, but not quite, the alphabetical order of the alphabets.
"""

from __future__ import annotations

import hashlib
import io
import re
import urllib.request
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_prep.once import one_at_a_time
from data_prep.picture_source import PictureClass, PictureSource, Reading
from metalm.fewshot.tasks.resize import resized
from metalm.training.disk import file_checksum, writing

DRAWERS = 20
SIDE = 105


class Part(NamedTuple):
    """One official set.

    Attributes:
        address: where its archive is.
        md5: of the archive, as torchvision checks it.
        alphabets: their names and numbers of characters, in the order of the files.
    """

    address: str
    md5: str
    alphabets: Mapping[str, int]


_PLACE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"

PARTS: Mapping[str, Part] = {
    "background": Part(
        f"{_PLACE}/images_background.zip",
        "68d2efa1b9178cc56df9314c21c6e718",
        {
            "Arcadian": 26,
            "Armenian": 41,
            "Asomtavruli_(Georgian)": 40,
            "Balinese": 24,
            "Bengali": 46,
            "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
            "Braille": 26,
            "Cyrillic": 33,
            "Early_Aramaic": 22,
            "Syriac_(Estrangelo)": 23,
            "Anglo-Saxon_Futhorc": 29,
            "Futurama": 26,
            "Grantha": 43,
            "Greek": 24,
            "Gujarati": 48,
            "Hebrew": 22,
            "Japanese_(hiragana)": 52,
            "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
            "Malay_(Jawi_-_Arabic)": 40,
            "Japanese_(katakana)": 47,
            "Korean": 40,
            "Latin": 26,
            "Alphabet_of_the_Magi": 20,
            "Mkhedruli_(Georgian)": 41,
            "Burmese_(Myanmar)": 34,
            "N_Ko": 33,
            "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
            "Sanskrit": 42,
            "Tagalog": 17,
            "Tifinagh": 55,
        },
    ),
    "evaluation": Part(
        f"{_PLACE}/images_evaluation.zip",
        "6b91aef0f799c5bb55b94e3f2daec811",
        {
            "Angelic": 20,
            "Atemayar_Qelisayer": 26,
            "Atlantean": 26,
            "Aurek-Besh": 26,
            "Avesta": 26,
            "Ge_ez": 26,
            "Glagolitic": 45,
            "Gurmukhi": 45,
            "Kannada": 41,
            "Keble": 26,
            "Malayalam": 47,
            "Manipuri": 40,
            "Mongolian": 30,
            "Old_Church_Slavonic_(Cyrillic)": 45,
            "Oriya": 46,
            "Syriac_(Serto)": 23,
            "Sylheti": 28,
            "Tengwar": 25,
            "Tibetan": 42,
            "ULOG": 26,
        },
    ),
}


def omniglot_source(
    folder: Path | None, downloads: Path, parts: Mapping[str, Part] = PARTS
) -> PictureSource:
    """Both sets of Omniglot.

    Args:
        folder: with images_background.zip and images_evaluation.zip, or with .npz of the same
            names; None downloads the archives.
        downloads: where downloaded archives are kept.
        parts: the official sets.

    Raises:
        ValueError: a file is missing, is not the official one, or cannot be downloaded.
    """
    classes: list[PictureClass] = []
    checksums: dict[str, str] = {}
    for name, part in parts.items():
        path = _find(folder, name) if folder is not None else fetch(part, downloads)
        if path.suffix == ".zip":
            checksums[path.name] = _checked(path, part)
            classes += _archive_classes(path, name, part)
        else:
            checksums[path.name] = file_checksum(path)
            classes += _array_classes(path, name, part)
    return PictureSource(name="omniglot", identity=checksums, classes=classes, channels=1)


def fetch(part: Part, folder: Path) -> Path:
    """The archive of a part, downloaded unless it is in the folder already.

    What another program downloads meanwhile is waited for, and then used.

    Raises:
        ValueError: no connection, or what came is not the official archive.
    """
    path = folder / part.address.rpartition("/")[2]
    if path.is_file():
        return path
    with one_at_a_time(folder, path.name):
        return path if path.is_file() else _downloaded(part, path)


def _downloaded(part: Part, path: Path) -> Path:
    """The archive, which has its name once it is whole and checked."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(part.address, timeout=60) as answer:
            _save(answer, partial_path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        partial_path.unlink(missing_ok=True)
        raise ValueError(
            f"{part.address} could not be fetched; expected an answer, found {error}; check the "
            "connection, or download the file and give its folder"
        ) from error
    try:
        _checked(partial_path, part)
    except ValueError:
        partial_path.unlink()
        raise
    return partial_path.rename(path)


def _save(answer: io.BufferedIOBase, path: Path) -> None:
    length = getattr(answer, "length", None)
    with (
        writing(path),
        path.open("wb") as file,
        tqdm(desc=path.stem, total=length, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while piece := answer.read(1 << 16):
            file.write(piece)
            bar.update(len(piece))


def _checked(path: Path, part: Part) -> str:
    """The MD5 of an archive, which is that of the official one."""
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != part.md5:
        raise ValueError(
            f"{path} is not the official archive; expected {part.md5} as its MD5, found {found}; "
            f"download it again from {part.address}"
        )
    return found


def _find(folder: Path, name: str) -> Path:
    paths = [folder / f"images_{name}{suffix}" for suffix in (".zip", ".npz")]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(
        f"Omniglot is not in {folder}; expected {paths[0].name} or {paths[1].name}, found neither; "
        "check the path, or leave it out to download the archives"
    )


def _named(part: Part) -> list[tuple[str, str]]:
    """Alphabet and character of every class of a part, in the order of the files."""
    return [
        (alphabet, f"character{number:02}")
        for alphabet, count in part.alphabets.items()
        for number in range(1, count + 1)
    ]


def _class(part: str, alphabet: str, character: str, read: Reading) -> PictureClass:
    name = f"{alphabet}/{character}"
    return PictureClass(name=name, group=alphabet, part=part, count=DRAWERS, read=read)


def _array_classes(path: Path, name: str, part: Part) -> list[PictureClass]:
    """From `images` bool [characters, drawers, 105, 105], True on paper."""
    characters = sum(part.alphabets.values())
    with np.load(path) as arrays:
        images = arrays["images"] if "images" in arrays else np.empty(0)
    expected = (characters, DRAWERS, SIDE, SIDE)
    if images.shape != expected or images.dtype != bool:
        raise ValueError(
            f"{path} does not hold the {name} set; expected images, bool {list(expected)}, found "
            f"{images.dtype} {list(images.shape)}; use arrays of the official pictures"
        )
    ink = np.where(images, np.uint8(0), np.uint8(255))[:, :, None]
    return [
        _class(name, *names, partial(resized, pictures))
        for names, pictures in zip(_named(part), ink, strict=True)
    ]


def _archive_classes(path: Path, name: str, part: Part) -> list[PictureClass]:
    """From images_background/ALPHABET/characterNN/NNNN_DD.png: number of character and drawer."""
    pattern = re.compile(rf"images_{name}/([^/]+)/(character\d\d)/(\d{{4}})_(\d\d)\.png")
    files: dict[tuple[int, str, str], list[tuple[int, str]]] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if match := pattern.fullmatch(entry):
                alphabet, character, number, drawer = match.groups()
                key = (int(number), alphabet, character)
                files.setdefault(key, []).append((int(drawer), entry))
    found = [(alphabet, character) for _, alphabet, character in sorted(files)]
    if found != _named(part) or any(len(each) != DRAWERS for each in files.values()):
        raise ValueError(
            f"{path} does not hold the {name} set; expected {sum(part.alphabets.values())} "
            f"characters of {len(part.alphabets)} alphabets with {DRAWERS} drawings each, found "
            f"{len(found)} characters with {sum(map(len, files.values()))} drawings; download it "
            "again"
        )
    return [
        _class(
            name,
            alphabet,
            character,
            partial(_read_drawings, path, [entry for _, entry in sorted(entries)]),
        )
        for (_, alphabet, character), entries in sorted(files.items())
    ]


def _read_drawings(path: Path, entries: list[str], size: int) -> NDArray[np.uint8]:
    drawings = []
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            with archive.open(entry) as file, Image.open(file) as image:
                drawings.append(255 - np.asarray(image.convert("L")))
    return resized(np.stack(drawings)[:, None], size)
