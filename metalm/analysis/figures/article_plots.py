"""Plots of whole articles and of groups of words, one panel a reading mode.

Methods without a look are not drawn.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from metalm.analysis.figures.appearance import (
    INK,
    Look,
    count_text,
    draw_bars,
    draw_line,
    draw_zero,
    legend_name,
    name_places,
    new_figure,
    new_panels,
    place_legend,
    side_by_side,
)
from metalm.analysis.figures.position_plots import GAIN_LABEL
from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.results import Results
from metalm.analysis.statistics.succession import Succession, letter

MOST_POINTS = 1500


def gain_along_articles(results: Mapping[str, Results], drawn: Mapping[str, Look]) -> Figure:
    """Running gain along consecutive articles, with boundaries and letters."""
    figure = new_figure(11, 1.2 + 3.1 * len(results))
    axes = list(figure.subplots(len(results), 1, sharey=True, squeeze=False)[:, 0])
    for axis, (mode, of_mode) in zip(axes, results.items(), strict=True):
        _draw_succession(axis, of_mode.succession, of_mode.scores.baselines, drawn)
        axis.set_title(f"reading mode: {in_plot(mode)}", loc="left", pad=18)
        axis.set_ylabel("gain over static\n(nats per word)")
    axes[-1].set_xlabel("words read")
    place_legend(figure, axes)
    return figure


def _draw_succession(
    axis: Axes, course: Succession, baselines: Mapping[str, str], drawn: Mapping[str, Look]
) -> None:
    total = int(course.boundaries[-1])
    step = max(1, total // MOST_POINTS)
    for method in (m for m in course.gain if m in drawn):
        gains, look = course.gain[method], drawn[method]
        label: str | None = legend_name(method, baselines[method])
        for start, end in course.spans:
            read = np.arange(start, end, step)
            axis.plot(read, gains[read], look.dashes, color=look.colour, linewidth=1.1, label=label)
            label = None
    draw_zero(axis)
    for boundary in course.boundaries[1:-1]:
        axis.axvline(boundary, color=INK, linewidth=0.9, linestyle=":")
    for index, (start, end) in enumerate(course.spans):
        axis.annotate(
            letter(index),
            ((start + end) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            weight="bold",
        )
    axis.grid(visible=False, axis="x")
    axis.set_xlim(0, total)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def gain_by_article(results: Mapping[str, Results], drawn: Mapping[str, Look]) -> Figure:
    """Each article's gain against its length, a mark an article and method."""
    figure, axes = new_panels(results, GAIN_LABEL)
    for axis, of_mode in zip(axes, results.values(), strict=True):
        scores = of_mode.scores
        for method in (m for m in scores.adaptive if m in drawn):
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
                label=legend_name(method, scores.baselines[method]),
                alpha=0.8,
            )
        draw_zero(axis)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("words in the article")
    place_legend(figure, axes)
    return figure


def gain_seen_and_new(results: Mapping[str, Results], drawn: Mapping[str, Look]) -> Figure:
    """Gain of new words, words seen before, and the latter by the distance to their last use."""
    figure, axes = new_panels(results, GAIN_LABEL)
    for axis, of_mode in zip(axes, results.values(), strict=True):
        seen, ago = of_mode.by_seen, of_mode.by_last_use
        methods = [method for method in seen.gain if method in drawn]
        for shift, method in zip(side_by_side(len(methods)), methods, strict=True):
            gains = enumerate([*seen.gain[method][:2], *ago.gain[method]])
            present = {place + shift: gain for place, gain in gains if gain is not None}
            places = np.array(list(present), np.float64)
            estimates = [gain.estimate for gain in present.values()]
            name = legend_name(method, of_mode.scores.baselines[method])
            draw_line(axis, places, estimates, drawn[method], name, joined=False)
            draw_bars(axis, places, list(present.values()), drawn[method])
        draw_zero(axis)
        axis.axvline(1.5, color=INK, linewidth=0.9, linestyle=":")
        axis.annotate(
            "seen before, by words since the last use",
            (1.6, 1.0),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
        words = [count_text(number) for number in (*seen.num_words[:2], *ago.num_words)]
        rows = {"": [*seen.groups[:2], *ago.groups], "words": words}
        name_places(axis, rows, axis is axes[0])
        axis.set_xlim(-0.5, len(words) - 0.5)
        axis.margins(y=0.09)
    place_legend(figure, axes)
    return figure
