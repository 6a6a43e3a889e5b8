"""From a name or a path to a prepared corpus on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

from data_prep import own_text, python_docs, synthetic, wikitext
from data_prep.once import prepared_once
from data_prep.prepared import identity, tokenizer_identity, write
from data_prep.text_source import TextSource
from metalm.language.text.articles import MANIFEST, read_manifest
from metalm.language.text.data_config import DataConfig
from metalm.language.text.vocabulary import Kind, Vocabulary

NAMED: Mapping[str, Callable[[], TextSource]] = {
    "python-docs": python_docs.python_docs_source,
    **{name: partial(wikitext.hub_source, name) for name in wikitext.HUB_CONFIGURATIONS},
    "synthetic": synthetic.synthetic_source,
}


def find_source(source: str) -> TextSource:
    """The text that a name or a path stands for.

    Args:
        source: a key of `NAMED`; or a folder with the WikiText files wiki.*.tokens or wiki.*.raw;
            or a folder with .txt or .md files; or a .jsonl file with {"title", "text"} a line.

    Raises:
        ValueError: it is none of them; the message lists the names.
    """
    if source in NAMED:
        return NAMED[source]()
    path = Path(source)
    if path.is_dir():
        files = wikitext.find_files(path)
        if files is not None:
            return wikitext.file_source(path, files)
        texts = own_text.find_text_files(path)
        if texts:
            return own_text.folder_source(path, texts)
        raise ValueError(
            f"there is no text in the folder {path}; expected wiki.train.tokens, wiki.valid.tokens "
            "and wiki.test.tokens (or .raw), or files ending in .txt or .md, found none of them; "
            "check the path"
        )
    if path.suffix == ".jsonl" and path.is_file():
        return own_text.json_lines_source(path)
    raise ValueError(
        f"unknown corpus; expected {', '.join(NAMED)}, a folder with WikiText files, a folder with "
        f".txt or .md files, or a .jsonl file, found {source!r}; check the spelling or the path"
    )


def prepare(
    source: str,
    *,
    tokenizer: Kind,
    vocabulary_size: int = 6000,
    root: Path | str = Path("data"),
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Prepare a corpus, or find it prepared already.

    Args:
        source: name or path, see `find_source`; or a folder that this function returned.
        tokenizer: "bpe" (learnt on the training split) or "word" (whole words).
        vocabulary_size: entries of the byte-pair vocabulary, the end of line included; whole words
            take as many as the text has.
        root: folder in which prepared corpora lie.
        vocabulary: of a trained model that is to read the corpus; None learns one from the text.

    Returns:
        The prepared folder, for `metalm.language.text.articles.open_corpus`. A folder that holds
        another finished corpus of the same name is left alone: the new one gets a checksum in its
        name.

    Raises:
        ValueError: unknown source or tokenizer, wrong text, or a root that cannot be written.
    """
    if tokenizer not in get_args(Kind):
        raise ValueError(
            f"unknown tokenizer; expected one of {', '.join(get_args(Kind))}, found {tokenizer!r}; "
            "choose one of them"
        )
    if vocabulary is None and (Path(source) / MANIFEST).is_file():
        return _already_prepared(Path(source), tokenizer, vocabulary_size)
    text = find_source(source)
    name = f"{text.name}-{tokenizer}" + (str(vocabulary_size) if tokenizer == "bpe" else "")
    return prepared_once(
        Path(root),
        name,
        identity(text, tokenizer, vocabulary_size, vocabulary),
        read_manifest,
        lambda folder: write(text, folder, tokenizer, vocabulary_size, vocabulary),
    )


def prepare_as(
    settings: DataConfig, source: str | None = None, vocabulary: Vocabulary | None = None
) -> Path:
    """`prepare` with the settings of a run.

    Args:
        settings: of the run.
        source: another corpus than the run's own.
        vocabulary: see `prepare`.
    """
    return prepare(
        settings.source if source is None else source,
        tokenizer=settings.tokenizer,
        vocabulary_size=settings.vocabulary_size,
        root=Path(settings.root),
        vocabulary=vocabulary,
    )


def _already_prepared(folder: Path, kind: Kind, size: int) -> Path:
    found = read_manifest(folder)["identity"]["tokenizer"]
    wanted = tokenizer_identity(kind, size)
    if found != wanted:
        raise ValueError(
            f"{folder} is prepared with another tokenizer; expected {wanted}, found {found}; "
            "ask for that one, or give the text itself"
        )
    return folder
