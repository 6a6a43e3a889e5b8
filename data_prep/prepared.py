"""Write the on-disk form of a corpus; metalm/language/text/articles.py reads it.

Articles are streamed: counted once, then tokenised and written in batches, so memory does not grow
with the corpus. The manifest is written last and atomically: its presence means success.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm import tqdm

from data_prep.text_source import TextArticle, TextSource, count
from metalm.language.text.articles import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    SPLITS,
    VOCABULARY,
    Article,
    check_tokens,
)
from metalm.language.text.vocabulary import Kind, Vocabulary, closed_words, learn_bpe
from metalm.training.disk import file_checksum, write_at_once, writing

# Characters held at once while tokenising: about 100 articles of WikiText.
BATCH_CHARACTERS = 2_000_000
STREAM_SUFFIX = ".stream"


def learn_vocabulary(source: TextSource, kind: Kind, size: int) -> Vocabulary:
    """Vocabulary of a source: byte pairs of the training split, or whole words.

    The words of a closed source are those of all its splits. Otherwise they are the words that
    occur twice or more in the training split and "<unk>", which the model meets as the words that
    occur once.
    """
    closed = kind == "word" and source.closed
    texts = tqdm(
        source.texts(*(SPLITS if closed else ("train",))),
        desc=f"{source.name}: learning the vocabulary",
        unit="article",
        disable=None,
    )
    if kind == "bpe":
        return learn_bpe(texts, size)
    if closed:
        return closed_words(texts, add_unknown=False)
    return closed_words(texts, add_unknown=True, minimum_count=2)


def write(
    source: TextSource,
    folder: Path,
    kind: Kind,
    size: int,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """Write a corpus into `folder`, replacing what an unfinished preparation left there.

    Args:
        source: the text.
        folder: created if need be.
        kind: tokenizer, "bpe" or "word".
        size: entries wanted of a byte-pair vocabulary, the end of line included.
        vocabulary: of a trained model, to be used instead of learning one.

    Returns:
        The manifest.

    Raises:
        ValueError: the text is not what it claims to be; or the disk is full, or the folder cannot
            be written: then nothing is left in it that takes room.
    """
    counts = count(source)
    source.check(counts)
    wanted = identity(source, kind, size, vocabulary)
    vocabulary = vocabulary or learn_vocabulary(source, kind, size)
    with writing(folder), _removed_if_refused(folder):
        _clear(folder)
        vocabulary.save(folder / VOCABULARY)
        splits = {}
        for split in SPLITS:
            articles = tqdm(
                source.splits[split](),
                desc=f"{source.name} {split}: writing",
                total=counts.articles[split],
                unit="article",
                disable=None,
            )
            num_tokens = _write_split(articles, folder / split, vocabulary, split)
            splits[split] = {
                "articles": counts.articles[split],
                "words": counts.words[split],
                "tokens": num_tokens,
            }
        manifest = {
            "format": FORMAT,
            "source": {"name": source.name},
            "identity": wanted,
            "tokenizer": {"kind": kind, "size": vocabulary.size},
            "splits": splits,
            "files": _describe_files(folder),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        write_at_once(folder / MANIFEST, text + "\n")
    return manifest


def identity(
    source: TextSource, kind: Kind, size: int, vocabulary: Vocabulary | None = None
) -> dict[str, Any]:
    """What tells one prepared corpus from another: the text and the tokenizer asked for (JSON)."""
    tokenizer = tokenizer_identity(kind, size)
    if vocabulary is not None:
        tokenizer = {"kind": vocabulary.kind, "checksum": vocabulary.checksum}
    return {"source": {"name": source.name, **source.identity}, "tokenizer": tokenizer}


def tokenizer_identity(kind: Kind, size: int) -> dict[str, Any]:
    """The tokenizer asked for; whole words take no size (JSON)."""
    return {"kind": kind, "size": size} if kind == "bpe" else {"kind": kind}


@contextmanager
def _removed_if_refused(folder: Path) -> Iterator[None]:
    """What is unfinished leaves the full disk; it would be written anew anyway."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            _clear(folder)
        raise


def _clear(folder: Path) -> None:
    """Remove what preparation writes, and nothing else; the manifest first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*SPLITS, VOCABULARY):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        (folder / name).with_suffix(STREAM_SUFFIX).unlink(missing_ok=True)


def _write_split(
    articles: Iterator[TextArticle], folder: Path, vocabulary: Vocabulary, split: str
) -> int:
    """Stream articles into an Arrow file, then into the form of `datasets`; returns tokens."""
    stream = folder.with_suffix(STREAM_SUFFIX)
    num_tokens = 0
    with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in _batches(articles):
            encoded = vocabulary.encode_batch([article.text for article in batch])
            rows = [Article(*one, *tokens) for one, tokens in zip(batch, encoded, strict=True)]
            for row in rows:
                check_tokens(row, vocabulary.size, split)
            num_tokens += sum(len(row.tokens) for row in rows)
            writer.write_batch(_record_batch(rows))
    dataset = Dataset.from_file(str(stream))
    with _quiet():
        dataset.save_to_disk(str(folder))
    del dataset  # unmap before removing: some systems refuse to remove a mapped file
    stream.unlink()
    return num_tokens


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`: ours have counted the same articles already."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def _batches(articles: Iterator[TextArticle]) -> Iterator[list[TextArticle]]:
    batch: list[TextArticle] = []
    characters = 0
    for article in articles:
        batch.append(article)
        characters += len(article.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _record_batch(rows: list[Article]) -> pa.RecordBatch:
    lengths = [len(row.tokens) for row in rows]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns = [
        pa.array([row.title for row in rows], pa.string()),
        pa.array([row.text for row in rows], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.tokens for row in rows]))),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.words for row in rows]))),
        pa.array([int(row.words[-1]) + 1 for row in rows], pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below the folder, by relative path."""
    paths = sorted(path for name in (*SPLITS, VOCABULARY) for path in (folder / name).rglob("*"))
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_checksum(path),
        }
        for path in paths
        if path.is_file()
    }
