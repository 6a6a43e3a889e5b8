"""The gain while several articles are read one after the other, with their boundaries."""

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from metalm.analysis.statistics.scores import FloatArray, IntArray, Scores

NUM_ARTICLES = 8
WINDOW = 200


@dataclass(frozen=True, kw_only=True)
class Succession:
    """Running gain along consecutive articles."""

    titles: tuple[str, ...]
    """Titles of the articles A, B, C ... [articles]."""
    boundaries: IntArray
    """Words read at the start of each article and at the end of the last [articles + 1]."""
    window: int
    """Width of the running mean, in words."""
    gain: dict[str, FloatArray]
    """Adaptive method -> running mean of the nats saved a word [words read]."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First word and one past the last word of each article [articles]."""
        return tuple((int(start), int(end)) for start, end in pairwise(self.boundaries))


def along_articles(
    scores: Scores, *, first: int = 0, num_articles: int = NUM_ARTICLES, window: int = WINDOW
) -> Succession:
    """Running mean of the gain along consecutive articles.

    The mean is over the `window` words around each word, and never reaches over a boundary: near
    one it takes the words on its own side, so that a jump there is not smeared out.

    Args:
        scores: the scores of a split, in reading order.
        first: index of the article called A.
        num_articles: how many articles; fewer if the split ends before.
        window: width of the running mean, in words.
    """
    chosen = scores.articles[first : first + num_articles]
    if not chosen:
        raise ValueError(
            f"no article to follow; expected first below {len(scores.articles)}, found {first}; "
            "start at an earlier article"
        )
    return Succession(
        titles=tuple(article.title for article in chosen),
        boundaries=np.cumsum([0, *(article.num_words for article in chosen)]),
        window=window,
        gain={
            method: np.concatenate(
                [
                    running_mean(a.losses[scores.baselines[method]] - a.losses[method], window)
                    for a in chosen
                ]
            )
            for method in scores.adaptive
        },
    )


def letter(index: int) -> str:
    """Name of an article in the row: A, B, C ... Z, then A1, B1 ..."""
    turn, place = divmod(index, len(ascii_uppercase))
    return ascii_uppercase[place] + (str(turn) if turn else "")


def running_mean(values: FloatArray, window: int) -> FloatArray:
    """Mean of the `window` values around each one, cut off at both ends; same length as values."""
    totals = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low = np.maximum(places - window // 2, 0)
    high = np.minimum(places - window // 2 + window, len(values))
    return (totals[high] - totals[low]) / (high - low)
