"""Which plots a report has, and what their captions say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from metalm.analysis.figures.appearance import SETTINGS, looks
from metalm.analysis.figures.article_plots import (
    gain_along_articles,
    gain_by_article,
    gain_seen_and_new,
)
from metalm.analysis.figures.position_plots import (
    RIVAL_LABEL,
    gain_by_position,
    perplexity_by_position,
)
from metalm.analysis.statistics.bootstrap import FEWEST_ARTICLES
from metalm.analysis.statistics.featured import all_methods, featured
from metalm.analysis.statistics.results import Results
from metalm.analysis.statistics.scores import Scores


class Caption(NamedTuple):
    """A plot's heading in the report, and what it shows."""

    title: str
    text: str


CAPTIONS = {
    "perplexity_by_position": Caption(
        "Perplexity by position in the article",
        "Perplexity per word in bins of word position. Articles drop out as they end, so bins hold "
        "different articles: compare the methods within a bin, not one bin with another.",
    ),
    "perplexity_by_position_cohort": Caption(
        "Perplexity by position, the same long articles in every bin",
        "As above, for the cohort of long articles, read up to the same length.",
    ),
    "gain_by_position": Caption(
        "Gain by position in the article",
        "Nats per word saved against the model without adaptation, on the same words. Bars are "
        "95 % intervals from a bootstrap over articles; bins with fewer than "
        f"{FEWEST_ARTICLES} articles have none.",
    ),
    "gain_by_position_cohort": Caption(
        "Gain by position, the same long articles in every bin",
        "As above, for the cohort of long articles, so that a rise is not a change of articles.",
    ),
    "gain_over_rival_by_position": Caption(
        "Gain over the best rival by position in the article",
        "Nats per word saved on the same words against the best rival with the same means: without "
        "a cache, a second rate or a learned mixture where the method itself has none.",
    ),
    "gain_along_articles": Caption(
        "Gain along articles in a row",
        "Running mean of the nats saved a word, in reading order; the mean never reaches over the "
        "boundary of an article.",
    ),
    "gain_by_article": Caption(
        "Gain and length of each article",
        "Nats per word saved over a whole article; one mark an article and method.",
    ),
    "gain_seen_and_new": Caption(
        "Words seen before in the article and new ones",
        "Nats per word saved, with 95 % intervals; on the right the words seen before, by how many "
        "words ago they were last used. Ends of lines and &lt;unk&gt; are left out here.",
    ),
}


def draw_all(results: Mapping[str, Results]) -> Iterator[tuple[str, Figure]]:
    """Draw every plot that the results allow, with the methods that `featured` chooses.

    Args:
        results: reading mode -> what was computed about it.

    Yields:
        A key of CAPTIONS, which is also the stem of the file, and the figure.
    """
    everywhere = {mode: r.by_position for mode, r in results.items()}
    cohort = {m: r.by_position_cohort for m, r in results.items() if r.by_position_cohort}
    rivals = {m: r.by_position_rivals for m, r in results.items() if r.by_position_rivals}
    scores = [r.scores for r in results.values()]
    every = looks(scores)
    drawn = {method: every[method] for method in featured(scores)}
    with matplotlib.rc_context(SETTINGS):
        yield "perplexity_by_position", perplexity_by_position(everywhere, drawn)
        if cohort:
            yield "perplexity_by_position_cohort", perplexity_by_position(cohort, drawn)
        if not any(r.scores.adaptive for r in results.values()):
            return
        yield "gain_by_position", gain_by_position(everywhere, drawn)
        if cohort:
            yield "gain_by_position_cohort", gain_by_position(cohort, drawn)
        if rivals:
            yield "gain_over_rival_by_position", gain_by_position(rivals, drawn, RIVAL_LABEL)
        few = {method: every[method] for method in _methods_of("gain_along_articles", scores)}
        yield "gain_along_articles", gain_along_articles(results, few)
        yield "gain_by_article", gain_by_article(results, drawn)
        yield "gain_seen_and_new", gain_seen_and_new(results, drawn)


def left_out(name: str, results: Mapping[str, Results]) -> str:
    """How many methods a plot leaves out and where they are, in Markdown; empty for none."""
    scores = [r.scores for r in results.values()]
    every, drawn = len(all_methods(scores)), len(_methods_of(name, scores))
    if drawn == every:
        return ""
    return (
        f" {every - drawn} of {every} methods are left out: the plot is of those without "
        "adaptation and the best of ours and of the rivals; the tables and "
        "[report.html](report.html) have all."
    )


def _methods_of(name: str, scores: Sequence[Scores]) -> tuple[str, ...]:
    """Lines that wind around one another are told apart only if they are very few."""
    return featured(scores, 1) if name == "gain_along_articles" else featured(scores)
