"""Curves that a method learnt from a few points, before its first update and after each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from metalm.analysis.figures.appearance import (
    COLOURS,
    INK,
    SETTINGS,
    new_figure,
    place_legend,
    save_figure,
)
from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.scores import FloatArray

PANEL_WIDTH, PANEL_HEIGHT, TITLE_LETTERS = 3.6, 3.4, 100
# From light to dark, the last one the darkest; the lightest still shows on white.
SHADES, LIGHTEST = "YlGnBu", 0.3


class LearntCurve(NamedTuple):
    """One task of regression.

    Attributes:
        points: x, ascending [points].
        truth: y there [points].
        support: x and y that were learnt from, each [support].
        answers: updates taken -> what the method says there [points]; or a name for what it says
            without any.
    """

    points: FloatArray
    truth: FloatArray
    support: tuple[FloatArray, FloatArray]
    answers: Mapping[int | str, FloatArray]


def curve_plot(curves: Sequence[LearntCurve], *, title: str = "") -> Figure:
    """One panel a task: the truth, the points learnt from, and the answers, darker at each update.

    Args:
        curves: the tasks.
        title: what they are, and who answers.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = new_figure(PANEL_WIDTH * max(len(curves), 2), PANEL_HEIGHT)
        axes = list(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0])
        shades = matplotlib.colormaps[SHADES]
        for axis, curve in zip(axes, curves, strict=True):
            updates = [taken for taken in curve.answers if isinstance(taken, int)]
            last = max(updates, default=0)
            for taken, values in curve.answers.items():
                before = taken == 0
                shade = taken / last if isinstance(taken, int) and last else 1.0
                axis.plot(
                    curve.points,
                    values,
                    color=INK if before else shades(LIGHTEST + (1 - LIGHTEST) * shade),
                    linestyle=":" if before else "-",
                    linewidth=1.4,
                    label=_name(taken),
                )
            axis.plot(
                curve.points, curve.truth, color=COLOURS[1], linestyle="--", label="truth", zorder=3
            )
            axis.plot(
                *curve.support,
                linestyle="none",
                marker="o",
                markersize=6,
                color=COLOURS[1],
                markeredgecolor="white",
                label="points learnt from",
                zorder=4,
            )
            axis.set_xlabel("x")
        axes[0].set_ylabel("y")
        figure.suptitle(fill(in_plot(title, 200), TITLE_LETTERS), fontsize=9.5, x=0.01, ha="left")
        place_legend(figure, axes)
    return figure


def write_curve_plot(curves: Sequence[LearntCurve], stem: Path, *, title: str = "") -> None:
    """Writes `curve_plot` as stem.png and stem.svg."""
    with matplotlib.rc_context(SETTINGS):
        save_figure(curve_plot(curves, title=title), stem)


def _name(taken: int | str) -> str:
    if isinstance(taken, str):
        return in_plot(taken)
    if taken == 0:
        return "before"
    return f"after {taken} update{'s' if taken > 1 else ''}"
