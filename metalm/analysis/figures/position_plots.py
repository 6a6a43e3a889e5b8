"""Plots against the position of a word in its article, one panel a reading mode.

Methods without a look are not drawn.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from metalm.analysis.figures.appearance import (
    Look,
    count_text,
    draw_bars,
    draw_line,
    draw_zero,
    legend_name,
    name_places,
    new_panels,
    place_legend,
    side_by_side,
)
from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.positions import ByPosition

GAIN_LABEL = "gain over static (nats per word)"
# Below this quotient of its ends a logarithmic axis would show too few of the round numbers.
NARROW = 1.7
RIVAL_LABEL = "gain over the best rival (nats per word)"


def perplexity_by_position(modes: Mapping[str, ByPosition], drawn: Mapping[str, Look]) -> Figure:
    """Perplexity per word in bins of position, a line a method; both axes logarithmic."""
    figure, axes = new_panels(modes, "perplexity per word")
    for axis, bins in zip(axes, modes.values(), strict=True):
        places = np.arange(len(bins.num_words), dtype=np.float64)
        for method in (m for m in bins.perplexity if m in drawn):
            draw_line(axis, places, bins.perplexity[method], drawn[method], in_plot(method))
        axis.set_yscale("log")
        _name_bins(axis, bins, axis is axes[0])
    low, high = axes[0].get_ylim()
    wide = LogLocator(subs=(1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    axes[0].yaxis.set_major_locator(wide if high > NARROW * low else MaxNLocator(6))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].yaxis.set_minor_locator(NullLocator())
    place_legend(figure, axes)
    return figure


def gain_by_position(
    modes: Mapping[str, ByPosition], drawn: Mapping[str, Look], label: str = GAIN_LABEL
) -> Figure:
    """Nats saved per word in bins of position, with intervals; methods stand side by side."""
    figure, axes = new_panels(modes, label)
    for axis, bins in zip(axes, modes.values(), strict=True):
        methods = [method for method in bins.gain if method in drawn]
        for shift, method in zip(side_by_side(len(methods)), methods, strict=True):
            gains = bins.gain[method]
            places = np.arange(len(gains)) + shift
            name = legend_name(method, bins.against[method])
            draw_line(axis, places, [g.estimate for g in gains], drawn[method], name)
            draw_bars(axis, places, gains, drawn[method])
        draw_zero(axis)
        _name_bins(axis, bins, axis is axes[0])
    place_legend(figure, axes)
    return figure


def _name_bins(axis: Axes, bins: ByPosition, named: bool) -> None:
    rows = {
        "": bins.labels,
        "articles": [count_text(number) for number in bins.num_articles],
        "words": [count_text(number) for number in bins.num_words],
    }
    name_places(axis, rows, named)
    axis.set_xlim(-0.5, len(bins.labels) - 0.5)
    axis.set_xlabel("position of the word in its article (words)")
    if bins.cohort_length is not None:
        title = axis.get_title(loc="left")
        axis.set_title(f"{title}; articles of {bins.cohort_length:,} words or more", loc="left")
