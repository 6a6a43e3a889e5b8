"""What the page's curves are made of: plotly's figures, lines, error bars and axes.

Text in a figure is read by plotly as a subset of HTML: names and titles are escaped before.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go

from metalm.analysis.figures.appearance import BESIDE_REACH, BESIDE_STEP, Look
from metalm.analysis.plain_text import shown
from metalm.analysis.statistics.bootstrap import Interval
from metalm.analysis.statistics.results import Json, as_json
from metalm.analysis.statistics.scores import STATIC
from metalm.analysis.statistics.succession import Succession, letter

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

# Colours that the page replaces by its own, which depend on the reader's scheme (page/figures.js).
INK, GRID = "#333333", "#8A8A8A"

Values: TypeAlias = Sequence[float | None] | Sequence[float] | np.ndarray[Any, Any]
"""Coordinates of points."""


def in_figure(text: str, limit: int = 48) -> str:
    """Untrusted text on one line, in which plotly finds no markup.

    Example:
        >>> in_figure("<b>a</b> & b")
        '&lt;b&gt;a&lt;/b&gt; &amp; b'
    """
    return html.escape(shown(text, limit), quote=False)


def new_figure(vertical: str, horizontal: str) -> go.Figure:
    """An empty figure with its axes named, without colours of the page itself."""
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


def line_of(
    method: str,
    places: Values,
    values: Values,
    look: Look,
    name: str,
    text: Sequence[str] | None = None,
) -> go.Scatter:
    """Points of a method, joined; texts are shown beside a point that is pointed at."""
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
        hovertemplate=hover("%{text}<br>%{y:.4g}", name),
    )


def symbol(look: Look) -> str:
    """Plotly's name of a method's marker."""
    return SYMBOLS[look.marker] + ("-open" if look.face == "white" else "")


def hover(content: str, name: str) -> str:
    """What a point says that is pointed at: the name of its line, and more."""
    # A percent sign followed by a brace would be read as a place for a value.
    return f"<b>{name.replace('%{', '% {')}</b><br>{content}<extra></extra>"


def _rounded(values: Values) -> list[float | None]:
    """Five digits: finer than any screen."""
    return [None if v is None or not np.isfinite(v) else float(f"{v:.5g}") for v in values]


def error_bars(intervals: Sequence[Interval], look: Look) -> dict[str, object]:
    """The 95 % intervals of points; where there is none, no bar."""
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


def bounds_text(interval: Interval) -> str:
    """An interval in words."""
    if interval.low is None or interval.high is None:
        return "no interval: too few articles"
    return f"95 % interval {interval.low:.3f} to {interval.high:.3f}"


def legend_name(method: str, against: str) -> str:
    """A method, and what it is compared with unless that is static."""
    name = in_figure(method)
    return name if against == STATIC else f"{name} (over {in_figure(against)})"


def name_places(figure: go.Figure, labels: Sequence[str], *, beside: bool = False) -> None:
    """Places 0, 1, 2 ...; the page puts the marks of the methods it shows beside one another."""
    if beside:
        figure.update_layout(meta={"reach": BESIDE_REACH, "step": BESIDE_STEP})
    figure.update_xaxes(
        tickmode="array", tickvals=list(range(len(labels))), ticktext=list(labels), showgrid=False
    )
    figure.update_xaxes(range=[-0.5, len(labels) - 0.5])


def name_articles(figure: go.Figure, course: Succession) -> None:
    """Letters and boundaries of the articles along an axis of words read."""
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


# On an axis whose values differ by less than this factor, so much room on both sides.
_HARDLY, _ROOM = 1.5, 2.5


def name_logarithms(
    figure: go.Figure, axis: str, first: Sequence[float], values: Sequence[float]
) -> None:
    """A logarithmic axis with some round numbers on it, as plain numbers.

    They are as dense as suits what is shown at first, and go on to where the other values are.
    Around values that hardly differ, such as a single one, there is room for them.
    """
    low, high = min(values), max(values)
    if high < _HARDLY * low:
        values = first = (low / _ROOM, high * _ROOM)
        figure.update_layout({f"{axis}axis": {"range": np.log10(values).tolist()}})
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


def draw_zero(figure: go.Figure) -> None:
    """A line where there is no gain."""
    figure.add_hline(0, line={"width": 1, "color": INK})


def plain(figure: go.Figure) -> Json:
    """Data and layout, as plotly.js takes them, without plotly's own style."""
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    return as_json({"data": content["data"], "layout": content["layout"]})
