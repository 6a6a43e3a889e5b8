"""Scores of one split in one reading mode: nats per word, for each method and each article.

Everything that this room reports is computed from these arrays, so that all methods share one
denominator: a word is a run of non-space characters, and each end of line counts as one more word.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metalm.analysis.whole_file import write_at_once

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

STATIC = "static"
END_OF_LINE = "\n"
UNKNOWN = "<unk>"
FORMAT = "metalm scores 1"


@dataclass(frozen=True, kw_only=True)
class ArticleScores:
    """What each method paid, in nats, for every word of one article.

    Raises:
        ValueError: if the article has no words, if a method's losses are not one number a word, or
            if one of them is not finite.
    """

    title: str
    """Title as the corpus has it; it is untrusted text and is cleaned only where it is shown."""
    words: list[str]
    r"""The words in reading order, with "\n" for each end of line."""
    losses: dict[str, FloatArray]
    """Method -> nats per word [num_words], minus the log-probability of each word."""

    def __post_init__(self) -> None:
        """Check shapes and finiteness, and hold the losses as float64."""
        if not self.words:
            raise ValueError(
                f"article {self.title!r} has no words; expected at least one, found 0; "
                "drop empty articles before scoring"
            )
        checked = {name: np.asarray(loss, np.float64) for name, loss in self.losses.items()}
        for method, loss in checked.items():
            if loss.shape != (len(self.words),):
                raise ValueError(
                    f"losses of {method!r} do not fit article {self.title!r}; expected one number "
                    f"for each of {len(self.words)} words, found shape {loss.shape}; "
                    "score every word exactly once"
                )
            if not np.isfinite(loss).all():
                word = int(np.flatnonzero(~np.isfinite(loss))[0])
                raise ValueError(
                    f"a loss of {method!r} in article {self.title!r} is not finite; expected nats, "
                    f"found {loss[word]} at word {word}; "
                    "let an article whose fast weights blew up fall back to the slow ones"
                )
        object.__setattr__(self, "losses", checked)

    @property
    def num_words(self) -> int:
        """Number of words, ends of lines included."""
        return len(self.words)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All articles of a split, read in order, in one reading mode.

    Raises:
        ValueError: if there are no articles, if an article lacks a method, or if a baseline is not
            one of the methods.

    Example:
        >>> article = ArticleScores(
        ...     title="A", words=["a", "b"], losses={"static": np.array([2.0, 4.0])}
        ... )
        >>> scores = Scores(methods=("static",), articles=(article,))
        >>> round(scores.perplexity("static"), 3)
        20.086
    """

    methods: tuple[str, ...]
    """Methods in the order in which tables and legends show them."""
    articles: tuple[ArticleScores, ...]
    """Articles in reading order."""
    baselines: dict[str, str] = field(default_factory=dict)
    """Method -> the method without adaptation that its gain is measured against ("static")."""
    ours: tuple[str, ...] = ()
    """Methods that are compared with the rivals (default: names that begin with "metalm")."""

    def __post_init__(self) -> None:
        """Check that every article has every method, and complete baselines and ours."""
        object.__setattr__(self, "methods", tuple(self.methods))
        object.__setattr__(self, "articles", tuple(self.articles))
        if not self.articles:
            raise ValueError(
                "scores hold no articles; expected at least one, found 0; "
                "check that the split is not empty"
            )
        if len(set(self.methods)) != len(self.methods) or not self.methods:
            raise ValueError(
                f"method names must be unique; expected at least one name, each once, "
                f"found {list(self.methods)}; rename the methods"
            )
        for article in self.articles:
            if set(article.losses) != set(self.methods):
                raise ValueError(
                    f"article {article.title!r} was scored by other methods; "
                    f"expected {sorted(self.methods)}, found {sorted(article.losses)}; "
                    "score every article with every method"
                )
        self._complete_baselines()
        ours = tuple(self.ours) or tuple(m for m in self.methods if m.startswith("metalm"))
        if not set(ours) <= set(self.methods):
            raise ValueError(
                f"ours names methods that were not scored; expected some of {list(self.methods)}, "
                f"found {list(ours)}; name scored methods only"
            )
        object.__setattr__(self, "ours", ours)

    def _complete_baselines(self) -> None:
        given = dict(self.baselines)
        self_baselined = {STATIC, *given.values()}
        default = {m: m if m in self_baselined else STATIC for m in self.methods}
        complete = {**default, **given}
        for method, baseline in complete.items():
            if method not in self.methods or baseline not in self.methods:
                raise ValueError(
                    f"baseline {baseline!r} of method {method!r} was not scored; expected both "
                    f"among {list(self.methods)}; score it, or name another one in baselines"
                )
        object.__setattr__(self, "baselines", complete)

    @property
    def adaptive(self) -> tuple[str, ...]:
        """Methods that have a gain to report: all that are not their own baseline."""
        return tuple(m for m in self.methods if self.baselines[m] != m)

    @property
    def rivals(self) -> tuple[str, ...]:
        """Methods that are not ours, the static ones included."""
        return tuple(m for m in self.methods if m not in self.ours)

    @cached_property
    def num_words(self) -> IntArray:
        """Words of each article [articles]."""
        return np.array([article.num_words for article in self.articles], np.int64)

    def nats(self, method: str) -> FloatArray:
        """Summed nats of each article [articles]."""
        return np.array([article.losses[method].sum() for article in self.articles])

    def perplexity(self, method: str) -> float:
        """Perplexity per word of the split, exp(sum of nats / number of words)."""
        return exponential(self.nats(method).sum() / self.num_words.sum())

    def article_weighted_perplexity(self, method: str) -> float:
        """Perplexity in which each article counts once, exp(mean over articles of nats per word).

        It is the geometric mean of the articles' own perplexities.
        """
        return exponential(np.mean(self.nats(method) / self.num_words))

    def perplexity_without_unknown(self, method: str) -> float | None:
        """Perplexity per word over the words that are not "<unk>"; None if no other word exists.

        Their probability is not renormalised: only the sum and the denominator leave "<unk>" out.
        """
        nats = sum(
            float(article.losses[method][known].sum())
            for article, known in zip(self.articles, self._known, strict=True)
        )
        num_known = sum(int(known.sum()) for known in self._known)
        return exponential(nats / num_known) if num_known else None

    @cached_property
    def num_unknown(self) -> int:
        """How many words of the split are "<unk>"."""
        return int(sum((~known).sum() for known in self._known))

    @cached_property
    def _known(self) -> list[NDArray[np.bool_]]:
        return [np.array([word != UNKNOWN for word in a.words]) for a in self.articles]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .npz file (arrays, and names as JSON text; no pickle), replacing it at once.

        Returns:
            The path written, which ends in .npz.
        """
        target = _npz(path)
        vocabulary, words = _index_words(self.articles)
        names = {
            "format": FORMAT,
            "methods": self.methods,
            "baselines": self.baselines,
            "ours": self.ours,
            "titles": [article.title for article in self.articles],
            "vocabulary": vocabulary,
        }
        losses = np.stack(
            [np.concatenate([a.losses[method] for a in self.articles]) for method in self.methods]
        )
        buffer = io.BytesIO()
        np.savez(
            buffer,
            names=np.frombuffer(json.dumps(names).encode(), np.uint8),
            num_words=self.num_words,
            words=words,
            losses=losses,
        )
        write_at_once(target, buffer.getvalue())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not one of ours, or is truncated or altered.
        """
        source = _npz(path)
        try:
            with source.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                names = json.loads(stored["names"].tobytes())
                num_words, words, losses = stored["num_words"], stored["words"], stored["losses"]
            ends = np.cumsum(num_words)
            if names["format"] != FORMAT or losses.shape != (len(names["methods"]), ends[-1]):
                raise ValueError(f"format {names['format']!r}, losses {losses.shape}")
            articles = tuple(
                _article(title, names, words[end - count : end], losses[:, end - count : end])
                for title, count, end in zip(names["titles"], num_words, ends, strict=True)
            )
            return cls(
                methods=tuple(names["methods"]),
                articles=articles,
                baselines=names["baselines"],
                ours=tuple(names["ours"]),
            )
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"scores in {source} cannot be read; expected a file written by Scores.save "
                f"({FORMAT!r}), found {type(error).__name__}: {error}; score the run again"
            ) from error


def exponential(nats: float | np.floating) -> float:
    """exp(nats), and the largest finite number where it would overflow."""
    return float(np.exp(min(float(nats), 709.0)))


def _npz(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    return given if given.suffix == ".npz" else given.with_name(given.name + ".npz")


def _index_words(articles: Sequence[ArticleScores]) -> tuple[list[str], NDArray[np.int32]]:
    index: dict[str, int] = {}
    words = [index.setdefault(word, len(index)) for article in articles for word in article.words]
    return list(index), np.array(words, np.int32)


def _article(
    title: str, names: Mapping[str, list[str]], words: NDArray[np.int32], losses: FloatArray
) -> ArticleScores:
    return ArticleScores(
        title=title,
        words=[names["vocabulary"][word] for word in words],
        losses=dict(zip(names["methods"], losses, strict=True)),
    )
