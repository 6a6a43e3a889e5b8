"""Text before it is tokenised: what every corpus supplies, and how it is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from metalm.language.text.articles import SPLITS
from metalm.language.text.vocabulary import split_words


class TextArticle(NamedTuple):
    """An article before it is tokenised."""

    title: str
    text: str


class Counts(NamedTuple):
    """Articles and words (ends of line included) of each split, and distinct words."""

    articles: dict[str, int]
    words: dict[str, int]
    vocabulary: int


def accept(counts: Counts) -> None:
    """Accept any counts: for text whose size nobody has published."""
    del counts


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Text of a corpus, ready to be read as often as needed, in the same order each time."""

    name: str
    """Short name, from which the folder is named."""
    identity: Mapping[str, Any]
    """What decides whether a prepared folder is of this very text (JSON): checksum, settings."""
    splits: Mapping[str, Callable[[], Iterator[TextArticle]]]
    """For "train", "valid" and "test", a function that begins reading the articles."""
    closed: bool = False
    """Whether the word vocabulary comes from all three splits, so that no word is unknown."""
    check: Callable[[Counts], None] = accept
    """Raises ValueError when the counts are not those of the corpus it claims to be."""

    def texts(self, *splits: str) -> Iterator[str]:
        """Texts of the named splits in order."""
        return (article.text for split in splits for article in self.splits[split]())


def count(source: TextSource) -> Counts:
    """Count articles, words and distinct words (the end of line is one of them).

    Raises:
        ValueError: a split or an article is empty.
    """
    articles = dict.fromkeys(SPLITS, 0)
    words = dict.fromkeys(SPLITS, 0)
    distinct: set[str] = set()
    for split in SPLITS:
        rows = tqdm(
            source.splits[split](),
            desc=f"{source.name} {split}: counting",
            unit="article",
            disable=None,
        )
        for article in rows:
            found = split_words(article.text)
            if not article.text.strip():
                raise ValueError(
                    f"an article is empty; expected at least one word in {article.title!r} "
                    f"({split}), found {len(article.text)} characters of white space; "
                    "fill it or take it away"
                )
            articles[split] += 1
            words[split] += len(found)
            distinct.update(found)
        if not articles[split]:
            raise ValueError(
                f"{source.name} has no articles in its {split} split; expected at least one, "
                "found 0; add text"
            )
    return Counts(articles, words, len(distinct))
