"""The plots of a report, one panel a reading mode."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from metalm.analysis.appearance import (
    SETTINGS,
    Look,
    looks,
    name_of,
    new_figure,
    place_legend,
)
from metalm.analysis.appearance import save_figure as save_figure
from metalm.analysis.bootstrap import Interval
from metalm.analysis.plain_text import in_plot
from metalm.analysis.positions import ByPosition
from metalm.analysis.results import Results

MOST_POINTS = 1500


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
        "Nats per word saved against the model without adaptation, on the same words; bars are 95 % "
        "intervals from a bootstrap over articles.",
    ),
    "gain_by_position_cohort": Caption(
        "Gain by position, the same long articles in every bin",
        "As above, for the cohort of long articles, so that a rise is not a change of articles.",
    ),
    "gain_along_articles": Caption(
        "Gain along eight articles in a row",
        "Running mean of the nats saved a word; it never reaches over the boundary of an article.",
    ),
    "gain_by_article": Caption(
        "Gain and length of each article",
        "One mark an article and method.",
    ),
    "gain_seen_and_new": Caption(
        "Words seen before in the article and new ones",
        "Nats per word saved, with 95 % intervals; on the right the words seen before, by how many "
        "words ago they were last used. Ends of lines and <unk> are left out here.",
    ),
}
Modes = Mapping[str, Results]


def draw_all(results: Modes) -> Iterator[tuple[str, Figure]]:
    """Draw every plot that the results allow, as pairs of file stem and figure."""
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        drawn = looks([r.scores for r in results.values()])
        everything = {mode: r.by_position for mode, r in results.items()}
        cohort = {
            mode: r.by_position_cohort
            for mode, r in results.items()
            if r.by_position_cohort is not None
        }
        yield "perplexity_by_position", perplexity_by_position(everything, drawn)
        if cohort:
            yield "perplexity_by_position_cohort", perplexity_by_position(cohort, drawn)
        if any(r.scores.adaptive for r in results.values()):
            yield "gain_by_position", gain_by_position(everything, drawn)
            if cohort:
                yield "gain_by_position_cohort", gain_by_position(cohort, drawn)
            yield "gain_along_articles", gain_along_articles(results, drawn)
            yield "gain_by_article", gain_by_article(results, drawn)
            yield "gain_seen_and_new", gain_seen_and_new(results, drawn)


def perplexity_by_position(modes: Mapping[str, ByPosition], drawn: dict[str, Look]) -> Figure:
    """Perplexity per word in bins of position, a line a method; both axes logarithmic."""
    figure, axes = _panels(modes, "perplexity per word", width=6.2)
    for axis, bins in zip(axes, modes.values(), strict=True):
        places = np.arange(len(bins.num_words))
        for method, values in bins.perplexity.items():
            _line(axis, places, values, drawn[method], method)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        _name_bins(axis, bins)
    place_legend(figure, axes)
    return figure


def gain_by_position(modes: Mapping[str, ByPosition], drawn: dict[str, Look]) -> Figure:
    """Nats saved per word in bins of position, with intervals; methods stand side by side."""
    figure, axes = _panels(modes, "gain over static (nats per word)", width=6.2)
    for axis, bins in zip(axes, modes.values(), strict=True):
        shifts = np.linspace(-0.28, 0.28, len(bins.gain)) if len(bins.gain) > 1 else [0.0]
        for shift, (method, gains) in zip(shifts, bins.gain.items(), strict=True):
            places = np.arange(len(gains)) + shift
            _line(axis, places, [g.estimate for g in gains], drawn[method], method)
            _bars(axis, places, gains, drawn[method])
        axis.axhline(0, color="#333333", linewidth=1)
        _name_bins(axis, bins)
    place_legend(figure, axes)
    return figure


def gain_along_articles(results: Modes, drawn: dict[str, Look]) -> Figure:
    """Running gain along consecutive articles, boundaries and letters marked."""
    figure = new_figure(11, 1.2 + 3.1 * len(results))
    axes = list(figure.subplots(len(results), 1, sharey=True, squeeze=False)[:, 0])
    for axis, (mode, of_mode) in zip(axes, results.items(), strict=True):
        course = of_mode.succession
        total = int(course.boundaries[-1])
        step = max(1, total // MOST_POINTS)
        for method, gains in course.gain.items():
            for start, end in zip(course.boundaries[:-1], course.boundaries[1:], strict=True):
                read = np.arange(start, end, step)
                look = drawn[method]
                label = name_of(method) if start == 0 else None
                style = {"color": look.colour, "linestyle": look.dashes, "linewidth": 1.3}
                axis.plot(read, gains[read], label=label, **style)
        axis.axhline(0, color="#333333", linewidth=1)
        for boundary in course.boundaries[1:-1]:
            axis.axvline(boundary, color="#333333", linewidth=0.8, linestyle=":")
        for index, title in enumerate(course.titles):
            middle = (course.boundaries[index] + course.boundaries[index + 1]) / 2
            axis.annotate(
                chr(ord("A") + index),
                (middle, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                weight="bold",
            )
            del title
        axis.set_xlim(0, total)
        axis.set_ylabel("gain over static\n(nats per word)")
        axis.set_title(in_plot(mode), loc="left", pad=16)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[-1].set_xlabel("words read")
    place_legend(figure, axes)
    return figure


def gain_by_article(results: Modes, drawn: dict[str, Look]) -> Figure:
    """Each article's gain against its length, a mark an article and method."""
    figure, axes = _panels(results, "gain over static (nats per word)", width=6.2)
    for axis, of_mode in zip(axes, results.values(), strict=True):
        scores = of_mode.scores
        for method in scores.adaptive:
            look = drawn[method]
            saved = scores.nats(scores.baselines[method]) - scores.nats(method)
            axis.scatter(
                scores.num_words,
                saved / scores.num_words,
                s=22,
                marker=look.marker,
                facecolor=look.face,
                edgecolor=look.colour,
                linewidth=1,
                label=name_of(method),
                alpha=0.8,
            )
        axis.axhline(0, color="#333333", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlabel("words in the article")
    place_legend(figure, axes)
    return figure


def gain_seen_and_new(results: Modes, drawn: dict[str, Look]) -> Figure:
    """Gain of new words, words seen before, and the latter by the distance to their last use."""
    figure, axes = _panels(results, "gain over static (nats per word)", width=6.6)
    for axis, of_mode in zip(axes, results.values(), strict=True):
        seen, ago = of_mode.by_seen, of_mode.by_last_use
        names = [*seen.groups[:2], *(f"{group} ago" for group in ago.groups)]
        words = [*seen.num_words[:2], *ago.num_words]
        shifts = np.linspace(-0.28, 0.28, len(seen.gain)) if len(seen.gain) > 1 else [0.0]
        for shift, method in zip(shifts, seen.gain, strict=True):
            gains = [*seen.gain[method][:2], *ago.gain[method]]
            present = [(i, g) for i, g in enumerate(gains) if g is not None]
            places = np.array([i for i, _ in present]) + shift
            kept = tuple(g for _, g in present)
            look = drawn[method]._replace(dashes="none")
            _line(axis, places, [g.estimate for g in kept], look, method)
            _bars(axis, places, kept, look)
        axis.axhline(0, color="#333333", linewidth=1)
        axis.axvline(1.5, color="#333333", linewidth=0.8, linestyle=":")
        labels = [f"{n}\n{_count(w)}" for n, w in zip(names, words, strict=True)]
        axis.set_xticks(np.arange(len(names)), labels)
        axis.set_xlabel("word last used in the article ... words ago; number of words below")
    place_legend(figure, axes)
    return figure


def _panels(modes: Mapping[str, object], label: str, width: float) -> tuple[Figure, list[Axes]]:
    """One panel a reading mode, side by side, with one vertical axis."""
    figure = new_figure(width * len(modes), 4.9)
    axes = list(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0])
    axes[0].set_ylabel(label)
    for axis, mode in zip(axes, modes, strict=True):
        axis.set_title(in_plot(mode), loc="left")
    return figure, axes


def _line(axis: Axes, places: np.ndarray, values: object, look: Look, method: str) -> None:
    axis.plot(
        places,
        np.asarray(values, np.float64),
        color=look.colour,
        linestyle=look.dashes,
        marker=look.marker,
        markerfacecolor=look.face,
        markersize=5.5,
        linewidth=1.6,
        label=name_of(method),
    )


def _bars(axis: Axes, places: np.ndarray, gains: tuple[Interval, ...], look: Look) -> None:
    for place, gain in zip(places, gains, strict=True):
        if gain.low is not None and gain.high is not None:
            axis.vlines(place, gain.low, gain.high, color=look.colour, linewidth=1.3)


def _name_bins(axis: Axes, bins: ByPosition) -> None:
    """Bin names, with the number of articles and of words in each."""
    labels = [
        f"{label}\n{articles:,}\n{_count(words)}"
        for label, articles, words in zip(
            bins.labels, bins.num_articles, bins.num_words, strict=True
        )
    ]
    axis.xaxis.set_major_locator(FixedLocator(range(len(labels))))
    axis.set_xticklabels(labels)
    axis.set_xlabel("position in the article (words); articles; words in the bin")


def _count(number: int) -> str:
    return f"{number:,}" if number < 10_000 else f"{number / 1000:,.0f}k"
