"""How the plots look: one colour and marker a method, sizes, and how figures are saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metalm.analysis.plain_text import in_plot
from metalm.analysis.scores import Scores

# Okabe and Ito's palette, told apart with all common forms of colour blindness; the yellow, which is
# faint on white, comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#C4B000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
STATIC_GREYS = ("#333333", "#8A8A8A")
WITH_CACHE = " + cache"
DOTS_PER_INCH = 150

SETTINGS = {
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
    """One look a method, the same in every panel.

    A method with the cache keeps the colour and marker of the method without it, dashed and hollow;
    methods without adaptation are grey.
    """
    methods = list(dict.fromkeys(m for s in scores for m in s.methods))
    still = {m for s in scores for m in s.methods if s.baselines[m] == m}
    families = list(dict.fromkeys(_family(m, methods) for m in methods if m not in still))
    chosen = {}
    for method in methods:
        if method in still:
            grey = STATIC_GREYS[sorted(still, key=methods.index).index(method) % len(STATIC_GREYS)]
            chosen[method] = Look(grey, ".", "-", grey)
            continue
        family = _family(method, methods)
        place = families.index(family)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        hollow = method != family
        chosen[method] = Look(
            colour, marker, "--" if hollow else "-", "white" if hollow else colour
        )
    return chosen


def _family(method: str, methods: Sequence[str]) -> str:
    base = method.removesuffix(WITH_CACHE)
    return base if base in methods else method


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of its own, in inches, outside of pyplot's state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def place_legend(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(columns, len(entries)),
            frameon=False,
        )


def name_of(method: str) -> str:
    """A method's name as the plots show it."""
    return in_plot(method)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write stem.png and stem.svg; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure.savefig(stem.with_suffix(".png"), dpi=DOTS_PER_INCH, metadata={"Software": None})
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
