"""Read a prepared corpus: memory-mapped articles, their tokens, and the manifest.

On disk (written by the program `data_prep`):

    train/ valid/ test/   Arrow folders of the `datasets` package, an article a row
    vocabulary/           the tokenizer (see vocabulary.py)
    manifest.json         source, counts, checksum of every file; written last
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from metalm.language.text.vocabulary import Vocabulary
from metalm.training.disk import file_checksum

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "valid", "test")
VOCABULARY = "vocabulary"
SCHEMA = pa.schema(
    [
        ("title", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("words", pa.list_(pa.int32())),
        ("num_words", pa.int64()),
    ]
)


class Article(NamedTuple):
    """One article.

    Attributes:
        title: its heading, file name or topic.
        text: its lines, each ended by a newline.
        tokens: int32 [tokens], read-only view of the file.
        words: int32 [tokens], index in the article of the word each token belongs to.
    """

    title: str
    text: str
    tokens: NDArray[np.int32]
    words: NDArray[np.int32]


class ArticleSet(Sequence[Article]):
    """Articles of one split, in order; nothing is read from disk before it is asked for.

    Args:
        table: Arrow table with the columns of `SCHEMA`.
        indices: rows that belong to the set, int64 [articles]; all of them when None.
    """

    def __init__(self, table: pa.Table, indices: NDArray[np.int64] | None = None) -> None:
        self._table = table
        self._columns = {name: table.column(name) for name in SCHEMA.names}
        self._indices = np.arange(table.num_rows) if indices is None else indices
        lengths = pa.compute.list_value_length(self._columns["tokens"])
        self.lengths: NDArray[np.int64] = _as_int64(lengths)[self._indices]
        self.word_counts: NDArray[np.int64] = _as_int64(self._columns["num_words"])[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Article: ...

    @overload
    def __getitem__(self, index: slice) -> ArticleSet: ...

    def __getitem__(self, index: int | slice) -> Article | ArticleSet:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"article {index} of {len(self)}")
        row = int(self._indices[index])
        columns = self._columns
        return Article(
            columns["title"][row].as_py(),
            columns["text"][row].as_py(),
            self.tokens(index),
            columns["words"][row].values.to_numpy(),
        )

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Tokens of one article, without reading anything else: a view of the file."""
        scalar = self._columns["tokens"][int(self._indices[index])]
        found: NDArray[np.int32] = scalar.values.to_numpy()
        return found

    def __iter__(self) -> Iterator[Article]:
        return (self[index] for index in range(len(self)))

    @property
    def titles(self) -> list[str]:
        """Title of every article, without reading anything else."""
        return [self._columns["title"][int(row)].as_py() for row in self._indices]

    @property
    def num_tokens(self) -> int:
        """Tokens of the set, ends of line included."""
        return int(self.lengths.sum())

    @property
    def num_words(self) -> int:
        """Whitespace words and ends of line: the denominator of a perplexity per word."""
        return int(self.word_counts.sum())

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> ArticleSet:
        """The articles at `indices`, in that order; repeats are allowed."""
        return ArticleSet(self._table, self._indices[np.asarray(indices, dtype=np.int64)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A prepared corpus: three sets of articles under one vocabulary."""

    folder: Path
    """Where it was read from."""
    manifest: dict[str, Any]
    """What `manifest.json` says: source, tokenizer, counts, checksums."""
    vocabulary: Vocabulary
    """The tokenizer and the end of line."""
    train: ArticleSet
    """Articles to learn from."""
    valid: ArticleSet
    """Articles on which choices are made."""
    test: ArticleSet
    """Articles scored once."""

    @property
    def name(self) -> str:
        """Name of the source, such as wikitext-2."""
        return str(self.manifest["source"]["name"])

    def verify(self) -> None:
        """Read every token once and check that it belongs to the vocabulary.

        Raises:
            ValueError: an id is out of range; the message names split, article, position and id.
        """
        for split in SPLITS:
            for article in getattr(self, split):
                check_tokens(article, self.vocabulary.size, split)


def check_tokens(article: Article, size: int, split: str = "corpus") -> None:
    """Check that every token id of an article lies in [0, size).

    Raises:
        ValueError: naming article, position and id of the first that does not.
    """
    outside = np.flatnonzero((article.tokens < 0) | (article.tokens >= size))
    if len(outside):
        position = int(outside[0])
        raise ValueError(
            f"a token of article {article.title!r} ({split}) is beyond the vocabulary; expected "
            f"ids in [0, {size}), found {int(article.tokens[position])} at position {position}; "
            "use the vocabulary that the articles were prepared with, or prepare them again"
        )


def open_corpus(folder: Path | str) -> Corpus:
    """Open a prepared corpus after checking it against its manifest.

    Args:
        folder: folder written by `data_prep`.

    Raises:
        ValueError: no such folder, preparation did not finish, or a file or count differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, recorded in manifest["files"].items():
        _check_file(folder, name, recorded)
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    if vocabulary.size != manifest["tokenizer"]["size"]:
        raise _differs(
            folder / VOCABULARY, manifest["tokenizer"]["size"], vocabulary.size, "entries"
        )
    sets = {split: _open_split(folder, split, manifest["splits"][split]) for split in SPLITS}
    return Corpus(folder=folder, manifest=manifest, vocabulary=vocabulary, **sets)


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a prepared corpus, as a dictionary.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    again = "prepare the corpus: python -m data_prep NAME_OR_PATH"
    if not folder.is_dir():
        raise ValueError(
            f"no prepared corpus; expected a folder, found nothing at {folder}; {again}"
        )
    if not path.is_file():
        raise ValueError(
            f"preparation of {folder} did not finish; expected {MANIFEST}, which is written last, "
            f"found none; {again}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = all(split in manifest["splits"] for split in SPLITS)
        complete = complete and all(
            key in manifest for key in ("source", "identity", "tokenizer", "files")
        )
        found = manifest["format"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged; expected the JSON that preparation writes, "
            f"found {type(error).__name__}: {error}; {again}"
        ) from error
    if found != FORMAT or not complete:
        raise ValueError(
            f"{path} is of another format; expected format {FORMAT}, found {found}; {again}"
        )
    return dict(manifest)


def _check_file(folder: Path, name: str, recorded: dict[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"a file of the prepared corpus is missing; expected {path} with "
            f"{recorded['bytes']} bytes, found none; prepare the corpus again"
        )
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise _differs(path, recorded["bytes"], size, "bytes")
    found = file_checksum(path)
    if found != recorded["sha256"]:
        raise _differs(path, recorded["sha256"], found, "as its SHA-256")


def _open_split(folder: Path, split: str, recorded: dict[str, int]) -> ArticleSet:
    # Imported late: it takes half a second, and single texts are read without it.
    from datasets import load_from_disk

    articles = ArticleSet(load_from_disk(str(folder / split)).data.table)
    found = {
        "articles": len(articles),
        "words": articles.num_words,
        "tokens": articles.num_tokens,
    }
    for what, count in found.items():
        if count != recorded[what]:
            raise _differs(folder / split, recorded[what], count, what)
    return articles


def _differs(path: Path, expected: object, found: object, what: str) -> ValueError:
    return ValueError(
        f"{path} is not what its manifest says; expected {expected} {what}, found {found}; "
        "remove the folder and prepare the corpus again"
    )


def _as_int64(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy(), dtype=np.int64)
