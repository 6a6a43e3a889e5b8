"""One score a method, with its interval: the picture of a comparison."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from metalm.analysis.figures.appearance import COLOURS, INK, SETTINGS, new_figure, save_figure
from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.bootstrap import Interval

ROW_HEIGHT, WIDTH, TITLE_LETTERS = 0.32, 6.5, 76


def score_plot(scores: Mapping[str, Interval], label: str, *, title: str = "") -> Figure:
    """Methods below one another in the order given, each a mark with a horizontal bar.

    Args:
        scores: method -> score and its interval.
        label: of the horizontal axis, with its unit.
        title: what the methods were scored on.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = new_figure(WIDTH, 1.4 + ROW_HEIGHT * len(scores))
        axis = figure.subplots()
        places = np.arange(len(scores))[::-1]
        for place, interval in zip(places, scores.values(), strict=True):
            if interval.low is not None and interval.high is not None:
                axis.hlines(place, interval.low, interval.high, color=COLOURS[0], linewidth=1.6)
            axis.plot(interval.estimate, place, "o", color=COLOURS[0], markersize=5.5)
            axis.annotate(
                f"{interval.estimate:.3g}",
                (interval.estimate, place),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=INK,
            )
        axis.set_yticks(places, [in_plot(name) for name in scores])
        axis.set_ylim(-0.6, len(scores) - 0.3)
        axis.margins(x=0.08)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(fill(in_plot(title, 200), TITLE_LETTERS), loc="left", fontsize=9.5)
    return figure


def write_score_plot(
    scores: Mapping[str, Interval], label: str, stem: Path, *, title: str = ""
) -> None:
    """Writes `score_plot` as stem.png and stem.svg."""
    with matplotlib.rc_context(SETTINGS):
        save_figure(score_plot(scores, label, title=title), stem)
