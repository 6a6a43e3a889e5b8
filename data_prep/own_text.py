"""The user's own text: a folder of .txt and .md files, or a JSON-lines file; one article each.

Text is UTF-8. Words are what white space separates, exactly as written; blank lines at the
beginning and the end of an article are dropped. Articles are split about 80 / 10 / 10 by a fixed
shuffle and keep their order inside a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data_prep.random_split import split_indices
from data_prep.text_source import TextArticle, TextSource
from metalm.language.text.articles import SPLITS
from metalm.training.disk import file_checksum

SUFFIXES = (".txt", ".md")
SHUFFLE_SEED = 1


def find_text_files(folder: Path) -> list[Path]:
    """The .txt and .md files below a folder in alphabetical order; hidden ones are left out."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(
        path
        for path in paths
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_texts(paths: Sequence[Path]) -> list[TextArticle]:
    """Single text files, one article each, with the file's name without its suffix as the title.

    Raises:
        ValueError: a file is missing, is not .txt or .md, is not UTF-8, or has no words.
    """
    for path in paths:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise ValueError(
                f"{path} is not a text; expected a file that ends in {' or '.join(SUFFIXES)}, "
                f"found {'another ending' if path.is_file() else 'no such file'}; check the path"
            )
    return list(_read_files([(path.name, path) for path in paths]))


def folder_source(folder: Path, paths: list[Path]) -> TextSource:
    """A folder of text files, found by `find_text_files`; titles are paths without the suffix.

    Raises:
        ValueError: there are fewer than three files.
    """
    with_names = [(path.relative_to(folder).as_posix(), path) for path in paths]
    digest = hashlib.sha256()
    for name, path in with_names:
        with _named(path):
            digest.update(f"{name} {file_checksum(path)}\n".encode())
    splits = _in_order(folder, len(paths))
    return TextSource(
        name=folder.resolve().name or "own-text",
        identity={"from": "text files", "checksum": digest.hexdigest()},
        splits={
            split: partial(_read_files, [with_names[index] for index in splits[split]])
            for split in SPLITS
        },
    )


def json_lines_source(path: Path) -> TextSource:
    """A JSON-lines file with an object {"title": ..., "text": ...} a line; a title may be missing.

    Raises:
        ValueError: there are fewer than three articles.
    """
    num_articles = sum(1 for _ in _filled_lines(path))
    splits = _in_order(path, num_articles)
    return TextSource(
        name=path.stem,
        identity={"from": "JSON lines", "checksum": file_checksum(path)},
        splits={split: partial(_read_lines, path, frozenset(splits[split])) for split in SPLITS},
    )


def _in_order(path: Path, num_articles: int) -> dict[str, list[int]]:
    try:
        splits = split_indices(num_articles, SHUFFLE_SEED)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {split: sorted(indices) for split, indices in splits.items()}


def _read_files(paths: list[tuple[str, Path]]) -> Iterator[TextArticle]:
    for name, path in paths:
        with _named(path):
            text = path.read_text(encoding="utf-8-sig")
        yield _article(name.rpartition(".")[0], text, str(path))


def _read_lines(path: Path, wanted: frozenset[int]) -> Iterator[TextArticle]:
    for index, (number, line) in enumerate(_filled_lines(path)):
        if index not in wanted:
            continue
        place = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place} is not JSON; expected an object with title and text, found {error}; "
                "correct the line"
            ) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{place} has no text; expected an object with the strings title and text, "
                f"found {line.strip()[:60]!r}; correct the line"
            )
        title = row.get("title")
        yield _article(f"line {number}" if title is None else str(title), text, place)


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines that are not blank."""
    with _named(path), path.open(encoding="utf-8-sig", newline="\n") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _article(title: str, text: str, place: str) -> TextArticle:
    if not text.strip():
        raise ValueError(
            f"an article is empty; expected at least one word in {place}, "
            f"found {len(text)} characters of white space; fill it or take it away"
        )
    try:
        (title + text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"an article is not Unicode text; expected characters that UTF-8 can hold in {place}, "
            f"found {error.object[error.start : error.end]!r}; correct it"
        ) from error
    return TextArticle(title, text.strip() + "\n")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file that cannot be read, or not as text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text; expected UTF-8, found the byte "
            f"{error.object[error.start]:#04x} at position {error.start}; convert the file"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read; expected a text file, found '{error}'; change its "
            "permissions, or leave it out"
        ) from error
