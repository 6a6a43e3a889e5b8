"""WikiText-2 and WikiText-103 (Merity et al. 2016), word-level and raw, from the hub or from files.

An article begins at its top-level heading, a line " = Title = " between blank lines (or at the
start of the file). Sections are " = = Section = = "; other lines that begin and end with "="
(tables of abbreviations, equations cut into lines) have no blank lines around them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, tee
from pathlib import Path

from datasets import load_dataset

from data_prep.text_source import Counts, TextArticle, TextSource, accept
from metalm.language.text.articles import SPLITS
from metalm.training.disk import file_checksum

HUB = "Salesforce/wikitext"
HUB_CONFIGURATIONS = {
    "wikitext-2": "wikitext-2-v1",
    "wikitext-103": "wikitext-103-v1",
    "wikitext-2-raw": "wikitext-2-raw-v1",
    "wikitext-103-raw": "wikitext-103-raw-v1",
}
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}

# Merity et al. 2016, table 1; words include one end of line a line. The paper gives WikiText-103
# 28,475 training articles; no copy was at hand to check the rule for headings against that number,
# so it refuses nothing.
OFFICIAL = {
    "wikitext-2": Counts(
        articles={"train": 600, "valid": 60, "test": 60},
        words={"train": 2_088_628, "valid": 217_646, "test": 245_569},
        vocabulary=33_278,
    ),
    "wikitext-103": Counts(
        articles={"valid": 60, "test": 60},
        words={"train": 103_227_021, "valid": 217_646, "test": 245_569},
        vocabulary=267_735,
    ),
}


def split_articles(lines: Iterable[str]) -> Iterator[TextArticle]:
    """Split the lines of a WikiText file into articles.

    What comes before the first heading belongs to the first article, so that every line is in
    exactly one. Lines are stripped of the white space around them; the hub's empty lines and the
    files' lines of a single space become the same text.

    Raises:
        ValueError: there are lines, but not one heading.
    """
    title = ""
    article: list[str] = []
    before = ""
    for line, after in _with_next(text.strip() for text in lines):
        if not before and not after and _is_heading(line):
            if title:
                yield _article(title, article)
                article = []
            title = line[1:-1].strip()
        article.append(line)
        before = line
    if title:
        yield _article(title, article)
    elif any(article):
        raise ValueError(
            "the text has no article; expected headings such as ' = Title = ' between blank lines, "
            f"found {len(article)} lines without one; use WikiText, or .txt files for own text"
        )


def hub_source(name: str) -> TextSource:
    """WikiText from the hub, fetched when it is first read and then kept by `datasets`.

    Args:
        name: a key of `HUB_CONFIGURATIONS`.
    """
    configuration = HUB_CONFIGURATIONS[name]
    return TextSource(
        name=name,
        identity={"from": HUB, "configuration": configuration},
        splits={split: partial(_hub_articles, configuration, split) for split in SPLITS},
        closed=name in OFFICIAL,
        check=partial(check_official, name) if name in OFFICIAL else accept,
    )


def find_files(folder: Path) -> dict[str, Path] | None:
    """The three files wiki.{train,valid,test}.tokens or .raw of a folder; None when it has none.

    Raises:
        ValueError: some of the three are missing.
    """
    for suffix in ("tokens", "raw"):
        paths = {split: folder / f"wiki.{split}.{suffix}" for split in SPLITS}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if len(missing) < len(paths):
            if missing:
                raise ValueError(
                    f"the WikiText folder {folder} is incomplete; expected "
                    f"{', '.join(path.name for path in paths.values())}, "
                    f"found no {', '.join(missing)}; copy the missing files"
                )
            return paths
    return None


def file_source(folder: Path, paths: dict[str, Path]) -> TextSource:
    """WikiText from its official files, found by `find_files`."""
    raw = paths["train"].suffix == ".raw"
    checksums = [file_checksum(path) for path in paths.values()]
    return TextSource(
        name=folder.resolve().name,
        identity={
            "from": "files",
            "files": [path.name for path in paths.values()],
            "checksum": hashlib.sha256(" ".join(checksums).encode()).hexdigest(),
        },
        splits={split: partial(_file_articles, path) for split, path in paths.items()},
        closed=not raw,
        check=accept if raw else partial(check_files, folder),
    )


def check_official(name: str, counts: Counts) -> None:
    """Refuse a word-level copy that is not the published corpus.

    Raises:
        ValueError: with the published counts and those of the copy.
    """
    expected = OFFICIAL[name]
    articles = {split: counts.articles[split] for split in expected.articles}
    if counts._replace(articles=articles) != expected:
        raise ValueError(
            f"this is not the official word-level {name}; expected {_describe(expected)}; "
            f"found {_describe(counts)}; get an unaltered copy from the hub ({HUB})"
        )


def check_files(folder: Path, counts: Counts) -> None:
    """Refuse files wiki.*.tokens that are neither WikiText-2 nor WikiText-103 word for word."""
    sizes = {name: official.words["train"] for name, official in OFFICIAL.items()}
    nearest = min(sizes, key=lambda name: abs(sizes[name] - counts.words["train"]))
    try:
        check_official(nearest, counts)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _with_next(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each line with the one after it; the last with an empty one."""
    now, ahead = tee(lines)
    next(ahead, None)
    return zip(now, chain(ahead, [""]), strict=False)


def _is_heading(line: str) -> bool:
    words = line.split()
    return len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="


def _article(title: str, lines: list[str]) -> TextArticle:
    return TextArticle(title, "\n".join(lines) + "\n")


def _describe(counts: Counts) -> str:
    parts = [f"{split} {count:,} tokens" for split, count in counts.words.items()]
    parts += [f"{split} {count:,} articles" for split, count in counts.articles.items()]
    return ", ".join([*parts, f"vocabulary {counts.vocabulary:,}"])


def _file_articles(path: Path) -> Iterator[TextArticle]:
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            yield from split_articles(file)
        except ValueError as error:  # a UnicodeDecodeError is one too
            raise ValueError(f"{path} cannot be read as WikiText: {error}") from error


def _hub_articles(configuration: str, split: str) -> Iterator[TextArticle]:
    return split_articles(_hub_lines(configuration, HUB_SPLITS[split]))


def _hub_lines(configuration: str, split: str) -> Iterator[str]:
    try:
        rows = load_dataset(HUB, configuration, split=split)
    except Exception as error:  # whatever the connection or the hub raises
        raise ValueError(
            f"{HUB} ({configuration}) could not be fetched; expected an answer of the hub, found "
            f"{type(error).__name__}: {error}; check the connection, or give a folder with the "
            "files wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens (or .raw)"
        ) from error
    for batch in rows.iter(batch_size=1000):
        yield from batch["text"]
