"""How the plots look: one colour and marker a method, sizes, and how figures are saved."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.bootstrap import Interval
from metalm.analysis.statistics.featured import (
    WITH_CACHE,
    WITH_LEARNED_CACHE,
    adaptive_families,
    all_methods,
    featured,
    methods_at_rest,
)
from metalm.analysis.statistics.scores import STATIC, FloatArray, Scores
from metalm.analysis.whole_file import write_at_once

# After Okabe and Ito's palette, told apart with all common forms of colour blindness; its yellow,
# faint on white, is darkened and comes last, and its black is left to the methods at rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#C4B000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
GREYS = ("#333333", "#8A8A8A")
GREY_DASHES = ("-", ":")
INK = "#333333"
DOTS_PER_INCH = 150
PANEL_WIDTH, PANEL_HEIGHT = 6.2, 4.9
# How far, at most, a mark stands from the middle of its place, which is one wide, and by how much
# more for each further method.
BESIDE_REACH, BESIDE_STEP = 0.28, 0.06
# Inches that a legend's entry takes: its line, a letter of its text (rounded up), and its height.
LEGEND_HANDLE, LEGEND_LETTER, LEGEND_ROW = 0.65, 0.085, 0.2

# Any: matplotlib's own types of the keys differ from version to version.
SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "svg.hashsalt": "metalm",
    "svg.fonttype": "path",
}


class Look(NamedTuple):
    """How one method is drawn."""

    colour: str
    marker: str
    dashes: str
    face: str


def looks(scores: Sequence[Scores]) -> dict[str, Look]:
    """One look a method, the same in every panel and different from that of every other method.

    A method with the cache keeps the colour and marker of the method without it, dashed and hollow,
    and with a learned cache dotted and filled; methods without adaptation are grey. Methods that
    are drawn at first choose their colours first; where there are more families than colours, the
    colours return with other markers.
    """
    first = featured(scores)
    chosen = {method: _grey_look(place) for place, method in enumerate(methods_at_rest(scores))}
    families = sorted(
        adaptive_families(scores).items(), key=lambda item: first.count(item[1][0]), reverse=True
    )
    for place, (name, members) in enumerate(families):
        turn, colour = place // len(COLOURS), COLOURS[place % len(COLOURS)]
        marker = MARKERS[(place + turn) % len(MARKERS)]
        for method in members:
            dashes, hollow = _IN_FAMILY[method.removeprefix(name)]
            chosen[method] = Look(colour, marker, dashes, "white" if hollow else colour)
    return {method: chosen[method] for method in all_methods(scores)}


# Line of a member by what its name has beyond the family's, and whether its marks are hollow.
_IN_FAMILY = {"": ("-", False), WITH_CACHE: ("--", True), WITH_LEARNED_CACHE: (":", False)}


def _grey_look(place: int) -> Look:
    turn, grey = place // len(GREYS), GREYS[place % len(GREYS)]
    dashes = GREY_DASHES[(place + turn) % len(GREY_DASHES)]
    marker = (".", *MARKERS)[turn // len(GREY_DASHES) % (1 + len(MARKERS))]
    return Look(grey, marker, dashes, grey)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of its own, in inches, outside of pyplot's state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(modes: Mapping[str, object], label: str) -> tuple[Figure, list[Axes]]:
    """One panel a reading mode, side by side, with one vertical axis named `label`."""
    figure = new_figure(PANEL_WIDTH * max(len(modes), 1.25), PANEL_HEIGHT)
    axes = list(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0])
    axes[0].set_ylabel(label)
    for axis, mode in zip(axes, modes, strict=True):
        axis.set_title(f"reading mode: {in_plot(mode)}", loc="left")
    return figure, axes


def place_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them, with as many columns as the width allows."""
    entries: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        widest = LEGEND_HANDLE + LEGEND_LETTER * max(len(label) for label in entries)
        columns = max(1, int(figure.get_figwidth() / widest))
        rows = -(-len(entries) // columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - 2))
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(columns, len(entries)),
            frameon=False,
        )


def legend_name(method: str, against: str) -> str:
    """A method's name in a plot of gains, with what it is compared with unless that is static."""
    return in_plot(method) if against == STATIC else f"{in_plot(method)} (over {in_plot(against)})"


def draw_line(
    axis: Axes, places: FloatArray, values: ArrayLike, look: Look, label: str, joined: bool = True
) -> None:
    """Marks of one method, joined by its line or not, entered into the legend as `label`."""
    axis.plot(
        places,
        np.asarray(values, np.float64),
        color=look.colour,
        linestyle=look.dashes if joined else "none",
        marker=look.marker,
        markerfacecolor=look.face,
        markersize=5.5,
        linewidth=1.6,
        label=label,
    )


def draw_bars(axis: Axes, places: FloatArray, intervals: Sequence[Interval], look: Look) -> None:
    """Vertical bars over the intervals that have bounds."""
    for place, interval in zip(places, intervals, strict=True):
        if interval.low is not None and interval.high is not None:
            axis.vlines(
                place, interval.low, interval.high, color=look.colour, linewidth=1.3, zorder=1.5
            )


def side_by_side(number: int) -> FloatArray:
    """Shifts that put the marks of `number` methods beside one another in a place one wide."""
    reach = min(BESIDE_REACH, BESIDE_STEP * (number - 1))
    return np.linspace(-reach, reach, number, dtype=np.float64)


def draw_zero(axis: Axes) -> None:
    """The line of no gain."""
    axis.axhline(0, color=INK, linewidth=1)


def name_places(axis: Axes, rows: Mapping[str, Sequence[str]], named: bool) -> None:
    """Label the places 0, 1, 2 ... with several rows of text.

    Args:
        axis: a panel whose horizontal axis counts places.
        rows: name of the row -> its texts [places]; the first row needs no name.
        named: whether to write the rows' names, left of the panel.
    """
    columns = zip(*rows.values(), strict=True)
    labels = ["\n".join(column) for column in columns]
    axis.set_xticks(np.arange(len(labels)), labels, linespacing=1.35)
    axis.tick_params(axis="x", length=0)
    if named:
        axis.annotate(
            "\n".join(rows),
            (0, 0),
            xytext=(-6, -3.5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=SETTINGS["xtick.labelsize"],
            linespacing=1.35,
            color="#555555",
        )


def count_text(number: int) -> str:
    """A count in at most five signs or so, such as 980, 7.7k or 120k."""
    if number < 1000:
        return str(number)
    thousands = number / 1000
    return f"{thousands:.1f}k" if thousands < 99.95 else f"{thousands:,.0f}k"


def save_figure(figure: Figure, stem: Path) -> None:
    """Write stem.png and stem.svg, each whole or not at all; the same figure gives the same bytes.

    Raises:
        OSError: what the system refuses; older pictures are as they were.
    """
    ways: Mapping[str, Any] = {
        ".png": {"dpi": DOTS_PER_INCH, "metadata": {"Software": None}},
        ".svg": {"metadata": {"Date": None}},
    }
    for ending, settings in ways.items():
        drawn = BytesIO()
        with matplotlib.rc_context(SETTINGS):
            figure.savefig(drawn, format=ending[1:], **settings)
        write_at_once(stem.with_suffix(ending), drawn.getvalue())
