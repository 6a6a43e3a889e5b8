"""The curves of the page: plotly figures of one reading mode, without colours of the page itself.

Text in a figure is read by plotly as a subset of HTML: names and titles are escaped before.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import plotly.graph_objects as go

from metalm.analysis.appearance import (
    BESIDE_REACH,
    BESIDE_STEP,
    COLOURS,
    GREYS,
    Look,
    count_text,
)
from metalm.analysis.bootstrap import Interval
from metalm.analysis.plain_text import shown
from metalm.analysis.plots import CAPTIONS
from metalm.analysis.position_plots import GAIN_LABEL, RIVAL_LABEL
from metalm.analysis.positions import ByPosition
from metalm.analysis.results import Json, Results, as_json
from metalm.analysis.scores import STATIC, FloatArray
from metalm.analysis.succession import Succession, letter
from metalm.analysis.traces import Trace

MOST_POINTS = 700
FEWEST_TICKS, MOST_TICKS = 4, 10
CLOSER = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "<": "triangle-left",
    ".": "circle",
}
DASHES = {"-": "solid", "--": "dash", ":": "dot"}


Values: TypeAlias = Sequence[float | None] | Sequence[float] | np.ndarray[Any, Any]
"""Coordinates of points."""

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
    return [Chart(name, title, caption, _plain(figure)) for name, title, caption, figure in made]


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


def in_figure(text: str, limit: int = 48) -> str:
    """Untrusted text on one line, in which plotly finds no markup.

    Example:
        >>> in_figure("<b>a</b> & b")
        '&lt;b&gt;a&lt;/b&gt; &amp; b'
    """
    return html.escape(shown(text, limit), quote=False)


def _perplexities(bins: ByPosition, drawn: Mapping[str, Look], first: Collection[str]) -> go.Figure:
    figure = _figure("perplexity per word", "position of the word in its article (words)")
    places = np.arange(len(bins.num_words))
    for method, values in bins.perplexity.items():
        figure.add_trace(
            _line(method, places, values, drawn[method], in_figure(method), text=_bin_texts(bins))
        )
    shown = [v for method, values in bins.perplexity.items() if method in first for v in values]
    _name_logarithms(figure, "y", shown, [v for vs in bins.perplexity.values() for v in vs])
    _name_places(figure, bins.labels)
    return figure


def _gains(bins: ByPosition, drawn: Mapping[str, Look], label: str) -> go.Figure:
    figure = _figure(label, "position of the word in its article (words)")
    for method, gains in bins.gain.items():
        places = np.arange(len(gains))
        name = _legend_name(method, bins.against[method])
        texts = [
            f"{text}<br>{_bounds(interval)}"
            for text, interval in zip(_bin_texts(bins), gains, strict=True)
        ]
        estimates = [gain.estimate for gain in gains]
        line = _line(method, places, estimates, drawn[method], name, text=texts)
        figure.add_trace(line.update(error_y=_error_bars(gains, drawn[method])))
    _name_places(figure, bins.labels, beside=True)
    _draw_zero(figure)
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
    figure = _figure(GAIN_LABEL, "words since the last use in the article")
    labels = [*seen.groups[:2], *ago.groups]
    counts = [*seen.num_words[:2], *ago.num_words]
    for method in seen.gain:
        gains = [*seen.gain[method][:2], *ago.gain[method]]
        present = [(n, gain) for n, gain in enumerate(gains) if gain is not None]
        line = _line(
            method,
            [n for n, _ in present],
            [gain.estimate for _, gain in present],
            drawn[method],
            _legend_name(method, results.scores.baselines[method]),
            text=[f"{labels[n]}: {counts[n]:,} words<br>{_bounds(gain)}" for n, gain in present],
        )
        intervals = [gain for _, gain in present]
        line.update(mode="markers", error_y=_error_bars(intervals, drawn[method]))
        figure.add_trace(line)
    named = [f"{a}<br>{count_text(n)}" for a, n in zip(labels, counts, strict=True)]
    _name_places(figure, named, beside=True)
    _draw_zero(figure)
    figure.add_vline(1.5, line={"width": 1, "dash": "dot", "color": GRID})
    return figure


def _along(results: Results, drawn: Mapping[str, Look]) -> go.Figure:
    course = results.succession
    figure = _figure("gain over static (nats per word)", "words read")
    for method, gains in course.gain.items():
        places, values = _with_gaps(course, gains)
        name = _legend_name(method, results.scores.baselines[method])
        line = _line(method, places, values, drawn[method], name).update(mode="lines")
        line.line.width = 1.4
        figure.add_trace(line.update(hovertemplate=_hover("word %{x:,}: %{y:.3f}", name)))
    _name_articles(figure, course)
    _draw_zero(figure)
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
    figure = _figure(GAIN_LABEL, "words in the article")
    titles = [in_figure(article.title) for article in scores.articles]
    for method in scores.adaptive:
        saved = (scores.nats(scores.baselines[method]) - scores.nats(method)) / scores.num_words
        name = _legend_name(method, scores.baselines[method])
        line = _line(method, scores.num_words, saved, drawn[method], name, text=titles)
        line.update(
            mode="markers",
            opacity=0.85,
            customdata=list(range(len(titles))),
            hovertemplate=_hover("%{text}<br>%{x:,} words: %{y:.3f}", name),
        )
        figure.add_trace(line)
    _name_logarithms(figure, "x", scores.num_words.tolist(), scores.num_words.tolist())
    _draw_zero(figure)
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
        figure = _figure(quantity.label, "words read")
        for trace in sorted(among, key=lambda trace: dashed.index(trace.method)):
            name = f"{in_figure(trace.name)} ({in_figure(trace.method)})"
            line = _line(trace.method, *_laid_out(course, trace), drawn[trace.method], name)
            turn, place = divmod(tensors.index(trace.name), len(COLOURS_OF_TENSORS))
            dash = DASHES_OF_METHODS[dashed.index(trace.method) % len(DASHES_OF_METHODS)]
            line.line.update(color=COLOURS_OF_TENSORS[place], dash=dash, width=2 + 2 * turn)
            line.update(
                meta=trace.method if shown[0] in first else None,
                mode="lines",
                showlegend=True,
                legendgroup=trace.method,
                visible=True if trace.method in shown else "legendonly",
                hovertemplate=_hover("word %{x:,}: %{y:.3g}", name),
            )
            figure.add_trace(line)
        _name_articles(figure, course)
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


# Colours that the page replaces by its own, which depend on the reader's scheme (page/charts.js).
INK, GRID = "#333333", "#8A8A8A"


def _figure(vertical: str, horizontal: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template=None,
        hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        showlegend=True,
        margin={"l": 8, "r": 8, "t": 24, "b": 8},
        hoverlabel={"namelength": -1, "align": "left"},
        xaxis={"title": {"text": horizontal}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": vertical}, "automargin": True, "zeroline": False},
    )
    return figure


def _line(
    method: str,
    places: Values,
    values: Values,
    look: Look,
    name: str,
    text: Sequence[str] | None = None,
) -> go.Scatter:
    return go.Scatter(
        meta=method,
        showlegend=False,
        x=_rounded(places),
        y=_rounded(values),
        text=text,
        name=name,
        mode="lines+markers",
        line={"color": look.colour, "dash": DASHES[look.dashes], "width": 2},
        marker={
            "color": look.colour,
            "size": 8,
            "symbol": symbol(look),
        },
        hovertemplate=_hover("%{text}<br>%{y:.4g}", name),
    )


def symbol(look: Look) -> str:
    """Plotly's name of a method's marker."""
    return SYMBOLS[look.marker] + ("-open" if look.face == "white" else "")


def _hover(content: str, name: str) -> str:
    # A percent sign followed by a brace would be read as a place for a value.
    return f"<b>{name.replace('%{', '% {')}</b><br>{content}<extra></extra>"


def _rounded(values: Values) -> list[float | None]:
    """Five digits: finer than any screen."""
    return [None if v is None or not np.isfinite(v) else float(f"{v:.5g}") for v in values]


def _error_bars(intervals: Sequence[Interval], look: Look) -> dict[str, object]:
    above = [None if i.high is None else i.high - i.estimate for i in intervals]
    below = [None if i.low is None else i.estimate - i.low for i in intervals]
    return {
        "type": "data",
        "symmetric": False,
        "array": _rounded(above),
        "arrayminus": _rounded(below),
        "thickness": 1.3,
        "width": 0,
        "color": look.colour,
    }


def _bounds(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "no interval: too few articles"
    return f"95 % interval {interval.low:.3f} to {interval.high:.3f}"


def _legend_name(method: str, against: str) -> str:
    name = in_figure(method)
    return name if against == STATIC else f"{name} (over {in_figure(against)})"


def _name_places(figure: go.Figure, labels: Sequence[str], *, beside: bool = False) -> None:
    """Places 0, 1, 2 ...; the page puts the marks of the methods it shows beside one another."""
    if beside:
        figure.update_layout(meta={"reach": BESIDE_REACH, "step": BESIDE_STEP})
    figure.update_xaxes(
        tickmode="array", tickvals=list(range(len(labels))), ticktext=list(labels), showgrid=False
    )
    figure.update_xaxes(range=[-0.5, len(labels) - 0.5])


def _name_articles(figure: go.Figure, course: Succession) -> None:
    for boundary in course.boundaries[1:-1]:
        figure.add_vline(int(boundary), line={"width": 1, "dash": "dot", "color": GRID})
    for index, (start, end) in enumerate(course.spans):
        figure.add_annotation(
            x=(start + end) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=f"<b>{letter(index)}</b>",
            hovertext=in_figure(course.titles[index]),
            showarrow=False,
        )
    figure.update_xaxes(range=[0, int(course.boundaries[-1])], showgrid=False, tickformat=",")


def _name_logarithms(
    figure: go.Figure, axis: str, first: Sequence[float], values: Sequence[float]
) -> None:
    """A logarithmic axis with some round numbers on it, as plain numbers.

    They are as dense as suits what is shown at first, and go on to where the other values are.
    """
    near, far = (round_numbers(min(v), max(v)) for v in (first or values, values))
    ticks = [t for t in far if t < near[0]] + near + [t for t in far if t > near[-1]]
    figure.update_layout(
        {
            f"{axis}axis": {
                "type": "log",
                "tickmode": "array",
                "tickvals": ticks,
                "ticktext": [f"{tick:,.6g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks],
            }
        }
    )


def round_numbers(low: float, high: float) -> list[float]:
    """At least four round numbers from low to high, or a little beyond, and not many more.

    Example:
        >>> round_numbers(35, 90)
        [30.0, 40.0, 50.0, 60.0, 80.0, 100.0]
    """
    low, high = low / 1.2, high * 1.2
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    numbers: list[float] = []
    for digits in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 6, 8),
        CLOSER,
        tuple(range(10, 100)),
    ):
        shift = 10 if digits[-1] >= 10 else 1
        numbers = [digit / shift * 10.0**power for power in powers for digit in digits]
        numbers = [number for number in numbers if low <= number <= high]
        if len(numbers) >= FEWEST_TICKS:
            break
    return numbers[:: max(1, -(-len(numbers) // MOST_TICKS))]


def _draw_zero(figure: go.Figure) -> None:
    figure.add_hline(0, line={"width": 1, "color": INK})


def _plain(figure: go.Figure) -> Json:
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    return as_json({"data": content["data"], "layout": content["layout"]})
