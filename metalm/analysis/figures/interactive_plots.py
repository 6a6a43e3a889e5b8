"""The curves of the page: plotly figures of one reading mode, made of `figure_parts.py`."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import plotly.graph_objects as go

from metalm.analysis.figures.appearance import (
    COLOURS,
    GREYS,
    Look,
    count_text,
)
from metalm.analysis.figures.figure_parts import (
    GRID,
    bounds_text,
    draw_zero,
    error_bars,
    hover,
    in_figure,
    legend_name,
    line_of,
    name_articles,
    name_logarithms,
    name_places,
    new_figure,
    plain,
)
from metalm.analysis.figures.plots import CAPTIONS
from metalm.analysis.figures.position_plots import GAIN_LABEL, RIVAL_LABEL
from metalm.analysis.plain_text import shown
from metalm.analysis.statistics.positions import ByPosition
from metalm.analysis.statistics.results import Json, Results
from metalm.analysis.statistics.scores import FloatArray
from metalm.analysis.statistics.succession import Succession, letter
from metalm.analysis.statistics.traces import Trace

MOST_POINTS = 700

Captioned: TypeAlias = tuple[str, str, str, go.Figure]
"""Name, heading, caption and figure."""


class Chart(NamedTuple):
    """One interactive figure, and what the page says about it."""

    name: str
    """Names the kind of figure, the same in every reading mode."""
    title: str
    """Heading."""
    caption: str
    """What it shows."""
    figure: Json
    """Data and layout, as plotly.js takes them."""


def charts(
    results: Results, drawn: Mapping[str, Look], traces: Sequence[Trace], first: Collection[str]
) -> list[Chart]:
    """Every figure that the results of one reading mode allow.

    Args:
        results: what was computed about the mode.
        drawn: method -> how it is drawn.
        traces: what was recorded while reading in this mode; may be empty.
        first: methods that the page shows at first; axes suit them.
    """
    adaptive = bool(results.scores.adaptive)
    made = [*(_by_position(results, drawn) if adaptive else ())]
    made += [_captioned("perplexity_by_position", _perplexities(results.by_position, drawn, first))]
    made += [*(_by_article_and_word(results, drawn) if adaptive else ())]
    made += _recorded(results, drawn, traces, first)
    return [Chart(name, title, caption, plain(figure)) for name, title, caption, figure in made]


def _by_position(results: Results, drawn: Mapping[str, Look]) -> Iterator[Captioned]:
    cohort, rivals = results.by_position_cohort, results.by_position_rivals
    yield _captioned("gain_by_position", _gains(results.by_position, drawn, GAIN_LABEL))
    if cohort is not None:
        yield _captioned("gain_by_position_cohort", _gains(cohort, drawn, GAIN_LABEL))
    if rivals is not None and rivals.against != results.by_position.against:
        yield _captioned("gain_over_rival_by_position", _gains(rivals, drawn, RIVAL_LABEL))


def _by_article_and_word(results: Results, drawn: Mapping[str, Look]) -> Iterator[Captioned]:
    yield _captioned("gain_along_articles", _along(results, drawn), _letters(results))
    yield _captioned("gain_by_article", _by_article(results, drawn), _PICK)
    yield _captioned("gain_seen_and_new", _seen(results, drawn))


_PICK = " Click on a mark to read the article."


def _captioned(name: str, figure: go.Figure, more: str = "") -> Captioned:
    return name, CAPTIONS[name].title, html.unescape(CAPTIONS[name].text) + more, figure


def _letters(results: Results) -> str:
    course = results.succession
    named = (f"{letter(i)}: {shown(title)}" for i, title in enumerate(course.titles))
    return f" Mean over {course.window:,} words. " + "; ".join(named) + "."


def _perplexities(bins: ByPosition, drawn: Mapping[str, Look], first: Collection[str]) -> go.Figure:
    figure = new_figure("perplexity per word", "position of the word in its article (words)")
    places = np.arange(len(bins.num_words))
    for method, values in bins.perplexity.items():
        figure.add_trace(
            line_of(method, places, values, drawn[method], in_figure(method), text=_bin_texts(bins))
        )
    shown = [v for method, values in bins.perplexity.items() if method in first for v in values]
    name_logarithms(figure, "y", shown, [v for vs in bins.perplexity.values() for v in vs])
    name_places(figure, bins.labels)
    return figure


def _gains(bins: ByPosition, drawn: Mapping[str, Look], label: str) -> go.Figure:
    figure = new_figure(label, "position of the word in its article (words)")
    for method, gains in bins.gain.items():
        places = np.arange(len(gains))
        name = legend_name(method, bins.against[method])
        texts = [
            f"{text}<br>{bounds_text(interval)}"
            for text, interval in zip(_bin_texts(bins), gains, strict=True)
        ]
        estimates = [gain.estimate for gain in gains]
        line = line_of(method, places, estimates, drawn[method], name, text=texts)
        figure.add_trace(line.update(error_y=error_bars(gains, drawn[method])))
    name_places(figure, bins.labels, beside=True)
    draw_zero(figure)
    return figure


def _bin_texts(bins: ByPosition) -> list[str]:
    return [
        f"words {label}: {num_words:,} words of {num_articles:,} articles"
        for label, num_words, num_articles in zip(
            bins.labels, bins.num_words, bins.num_articles, strict=True
        )
    ]


def _seen(results: Results, drawn: Mapping[str, Look]) -> go.Figure:
    seen, ago = results.by_seen, results.by_last_use
    figure = new_figure(GAIN_LABEL, "words since the last use in the article")
    labels = [*seen.groups[:2], *ago.groups]
    counts = [*seen.num_words[:2], *ago.num_words]
    for method in seen.gain:
        gains = [*seen.gain[method][:2], *ago.gain[method]]
        present = [(n, gain) for n, gain in enumerate(gains) if gain is not None]
        line = line_of(
            method,
            [n for n, _ in present],
            [gain.estimate for _, gain in present],
            drawn[method],
            legend_name(method, results.scores.baselines[method]),
            text=[
                f"{labels[n]}: {counts[n]:,} words<br>{bounds_text(gain)}" for n, gain in present
            ],
        )
        intervals = [gain for _, gain in present]
        line.update(mode="markers", error_y=error_bars(intervals, drawn[method]))
        figure.add_trace(line)
    named = [f"{a}<br>{count_text(n)}" for a, n in zip(labels, counts, strict=True)]
    name_places(figure, named, beside=True)
    draw_zero(figure)
    figure.add_vline(1.5, line={"width": 1, "dash": "dot", "color": GRID})
    return figure


def _along(results: Results, drawn: Mapping[str, Look]) -> go.Figure:
    course = results.succession
    figure = new_figure("gain over static (nats per word)", "words read")
    for method, gains in course.gain.items():
        places, values = _with_gaps(course, gains)
        name = legend_name(method, results.scores.baselines[method])
        line = line_of(method, places, values, drawn[method], name).update(mode="lines")
        line.line.width = 1.4
        figure.add_trace(line.update(hovertemplate=hover("word %{x:,}: %{y:.3f}", name)))
    name_articles(figure, course)
    draw_zero(figure)
    return figure


def _with_gaps(course: Succession, values: FloatArray) -> tuple[list[int], list[float | None]]:
    """Some of the points of each article, with a gap between two articles."""
    step = max(1, int(course.boundaries[-1]) // MOST_POINTS)
    places: list[int] = []
    chosen: list[float | None] = []
    for start, end in course.spans:
        within = range(start, end, step)
        places += [*within, end]
        chosen += [*(float(values[place]) for place in within), None]
    return places, chosen


def _by_article(results: Results, drawn: Mapping[str, Look]) -> go.Figure:
    scores = results.scores
    figure = new_figure(GAIN_LABEL, "words in the article")
    titles = [in_figure(article.title) for article in scores.articles]
    for method in scores.adaptive:
        saved = (scores.nats(scores.baselines[method]) - scores.nats(method)) / scores.num_words
        name = legend_name(method, scores.baselines[method])
        line = line_of(method, scores.num_words, saved, drawn[method], name, text=titles)
        line.update(
            mode="markers",
            opacity=0.85,
            customdata=list(range(len(titles))),
            hovertemplate=hover("%{text}<br>%{x:,} words: %{y:.3f}", name),
        )
        figure.add_trace(line)
    name_logarithms(figure, "x", scores.num_words.tolist(), scores.num_words.tolist())
    draw_zero(figure)
    return figure


# In figures with a colour a tensor, the lines of the first method, of the second ...
DASHES_OF_METHODS = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
COLOURS_OF_TENSORS = (*COLOURS, *GREYS)


def _recorded(
    results: Results, drawn: Mapping[str, Look], traces: Sequence[Trace], first: Collection[str]
) -> Iterator[Captioned]:
    """A figure a quantity; a line a tensor and method, along the articles A, B, C ..."""
    course, ours = results.succession, set(results.scores.ours)
    for quantity in dict.fromkeys(trace.quantity for trace in traces):
        among = [trace for trace in traces if trace.quantity == quantity]
        tensors = list(dict.fromkeys(trace.name for trace in among))
        methods = sorted({trace.method for trace in among}, key=list(drawn).index)
        shown = [m for m in methods if m in ours] or methods
        shown = [m for m in shown if m in first] or shown[:1]
        dashed = [*shown, *(m for m in methods if m not in shown)]
        figure = new_figure(quantity.label, "words read")
        for trace in sorted(among, key=lambda trace: dashed.index(trace.method)):
            name = f"{in_figure(trace.name)} ({in_figure(trace.method)})"
            line = line_of(trace.method, *_laid_out(course, trace), drawn[trace.method], name)
            turn, place = divmod(tensors.index(trace.name), len(COLOURS_OF_TENSORS))
            dash = DASHES_OF_METHODS[dashed.index(trace.method) % len(DASHES_OF_METHODS)]
            line.line.update(color=COLOURS_OF_TENSORS[place], dash=dash, width=2 + 2 * turn)
            line.update(
                meta=trace.method if shown[0] in first else None,
                mode="lines",
                showlegend=True,
                legendgroup=trace.method,
                visible=True if trace.method in shown else "legendonly",
                hovertemplate=hover("word %{x:,}: %{y:.3g}", name),
            )
            figure.add_trace(line)
        name_articles(figure, course)
        caption = quantity.text + " Click on a name in the legend to show its line, or to hide it."
        yield f"recorded_{quantity.key}", quantity.title, caption, figure


def _laid_out(course: Succession, trace: Trace) -> tuple[list[float], list[float | None]]:
    """Places in words read, and values, with a gap between two articles."""
    places: list[float] = []
    values: list[float | None] = []
    most = max(2, MOST_POINTS // len(course.spans))
    for (start, _), words, of_article in zip(course.spans, trace.words, trace.values, strict=False):
        kept = telling_points(np.asarray(of_article, np.float64), most)
        places += [start + float(words[place]) for place in kept] + [float(start)]
        values += [float(of_article[place]) for place in kept] + [None]
    return places, values


def telling_points(values: FloatArray, most: int) -> list[int]:
    """Places of at most so many values that keep the shape of a curve, its peaks included.

    Of each stretch the value that is farthest from the stretch's median is kept.

    Example:
        >>> telling_points(np.array([1.0, 1.0, 9.0, 1.0, 1.0, 0.0]), 2)
        [2, 5]
    """
    if len(values) <= most:
        return list(range(len(values)))
    kept = []
    for stretch in np.array_split(np.arange(len(values)), most):
        away = np.abs(values[stretch] - np.median(values[stretch]))
        kept.append(int(stretch[int(np.argmax(away))]))
    return kept
