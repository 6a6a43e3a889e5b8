"""Synthetic articles of which the best possible gain from remembering is known in closed form.

An article has a cast of K names, a random subset of N invented names. Each line reads

    NAME verb NAME .

with both names drawn uniformly from the cast and the verb uniformly from V verbs. Without memory of
the article a name costs log N nats. With it, after j distinct names, Bayes' rule gives

    P(a name seen before) = 1 / K                    each
    P(a name not seen)    = (K - j) / (K (N - j))    each

and that is the best any reader can do. The verb costs log V; full stop and end of line cost
nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.text_source import TextArticle, TextSource
from metalm.language.text.articles import SPLITS
from metalm.language.text.vocabulary import END_OF_LINE_TEXT, split_words

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
VERBS = ("calls", "finds", "greets", "helps", "meets", "sees", "thanks", "visits")
STOP = "."


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticText:
    """How much text, and how much of it can be remembered."""

    num_names: int = 100
    """Invented names in all, N."""
    cast_size: int = 5
    """Names of one article, K."""
    num_verbs: int = 8
    """Verbs, V."""
    num_lines: int = 100
    """Lines of an article."""
    num_articles: dict[str, int] = field(
        default_factory=lambda: {"train": 200, "valid": 25, "test": 25}
    )
    """Articles of each split."""
    seed: int = 3
    """Of the names and of the text."""

    def __post_init__(self) -> None:
        """Check that names and verbs suffice."""
        most = (len(CONSONANTS) * len(VOWELS)) ** 2
        if not 1 <= self.cast_size <= self.num_names <= most:
            raise ValueError(
                f"the cast does not fit the names; expected 1 <= cast_size <= num_names <= {most}, "
                f"found {self.cast_size} and {self.num_names}; change one of them"
            )
        if not 1 <= self.num_verbs <= len(VERBS):
            raise ValueError(
                f"no such number of verbs; expected 1 to {len(VERBS)}, found {self.num_verbs}; "
                "change num_verbs"
            )


class BestLosses(NamedTuple):
    """Least possible expected cost of every word, in nats.

    Attributes:
        with_memory: float64 [words], of a reader who remembers the names of the article.
        without_memory: float64 [words], of one who knows the language but no past line.
    """

    with_memory: NDArray[np.float64]
    without_memory: NDArray[np.float64]


def synthetic_source(settings: SyntheticText | None = None) -> TextSource:
    """Articles with their own invented names; the same settings give the same text."""
    settings = settings or SyntheticText()
    return TextSource(
        name="synthetic",
        identity={"from": "data_prep.synthetic", **asdict(settings)},
        splits={split: partial(_articles, settings, split) for split in SPLITS},
        closed=True,
    )


def invent_names(settings: SyntheticText) -> list[str]:
    """The N names: two syllables each, all different."""
    syllables = ["".join(pair) for pair in itertools.product(CONSONANTS, VOWELS)]
    pairs = range(len(syllables) ** 2)
    chosen = random.Random(f"{settings.seed} names").sample(pairs, settings.num_names)
    halves = (divmod(pair, len(syllables)) for pair in chosen)
    return [(syllables[first] + syllables[second]).capitalize() for first, second in halves]


def best_losses(text: str, settings: SyntheticText) -> BestLosses:
    """What the best reader pays for each word of an article, with and without memory.

    Args:
        text: text of one article made with `settings`.
        settings: its N, K and V.

    Returns:
        Nats for every word, aligned with `split_words(text)`.

    Raises:
        ValueError: a word that the settings cannot have produced.
    """
    num_names, cast_size = settings.num_names, settings.cast_size
    names, verbs = set(invent_names(settings)), set(VERBS[: settings.num_verbs])
    seen: set[str] = set()
    with_memory, without_memory = [], []
    places = itertools.cycle((names, verbs, names, {STOP}, {END_OF_LINE_TEXT}))
    for position, (word, allowed) in enumerate(zip(split_words(text), places)):  # noqa: B905
        if word not in allowed or len(seen | ({word} & names)) > cast_size:
            raise ValueError(
                f"the text is not of these settings; expected lines 'NAME verb NAME .' with "
                f"{cast_size} names, found {word!r} at word {position}; use the settings that "
                "made it"
            )
        forgetful = np.log(len(allowed))
        remembering = forgetful
        if allowed is names:
            remembering = np.log(cast_size)
            if word not in seen:
                left = cast_size - len(seen)
                remembering += np.log((num_names - len(seen)) / left)
                seen.add(word)
        with_memory.append(remembering)
        without_memory.append(forgetful)
    return BestLosses(np.array(with_memory), np.array(without_memory))


def expected_gains(settings: SyntheticText) -> NDArray[np.float64]:
    """Expected nats that memory saves at each name of an article, in order: float64 [2 lines].

    With p_t(j) the probability of j distinct names among the first t,

        p_{t+1}(j) = p_t(j) j / K + p_t(j - 1) (K - j + 1) / K
        gain_t = log(N / K) - sum_j p_t(j) (K - j) / K log((N - j) / (K - j))
    """
    num_names, cast_size = settings.num_names, settings.cast_size
    distinct = np.arange(cast_size + 1)
    new = (cast_size - distinct) / cast_size
    extra = np.zeros(cast_size + 1)
    extra[:-1] = np.log((num_names - distinct[:-1]) / (cast_size - distinct[:-1]))
    probability = np.zeros(cast_size + 1)
    probability[0] = 1.0
    gains = np.empty(2 * settings.num_lines)
    for draw in range(len(gains)):
        gains[draw] = np.log(num_names / cast_size) - probability @ (new * extra)
        moved = probability * new
        probability -= moved
        probability[1:] += moved[:-1]
    return gains


def _articles(settings: SyntheticText, split: str) -> Iterator[TextArticle]:
    names = invent_names(settings)
    verbs = VERBS[: settings.num_verbs]
    for index in range(settings.num_articles[split]):
        source = random.Random(f"{settings.seed} {split} {index}")
        cast = source.sample(names, settings.cast_size)
        lines = (
            f"{source.choice(cast)} {source.choice(verbs)} {source.choice(cast)} {STOP}\n"
            for _ in range(settings.num_lines)
        )
        yield TextArticle(f"{split} {index}", "".join(lines))
