"""A few-shot task of pictures with a method's answers: who was taken for whom."""

from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from metalm.analysis.figures.appearance import COLOURS, INK, SETTINGS, new_figure, save_figure
from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.scores import FloatArray

TILE, GAP, MARGIN, TITLE_LETTERS = 0.52, 0.14, 0.75, 58
"""In inches, but for the letters."""
RIGHT, WRONG = COLOURS[0], COLOURS[1]

Integers = NDArray[np.int64]


class AnsweredEpisode(NamedTuple):
    """One task of pictures; numbers of classes are places in the task, from 0.

    Attributes:
        support: pictures learnt from [items, channels, height, width], ink (or full colour) = 1.
        support_targets: their classes [items].
        query: pictures asked for [queries, channels, height, width].
        query_targets: their classes [queries].
        answers: what the method says [queries].
    """

    support: FloatArray
    support_targets: Integers
    query: FloatArray
    query_targets: Integers
    answers: Integers


def episode_plot(episode: AnsweredEpisode, *, title: str = "") -> Figure:
    """One row a class: what was learnt from, then the queries that the method takes for it.

    A right answer has a solid frame; a wrong one a dashed frame of another colour and the letter of
    the class that it is.
    """
    way = int(episode.support_targets.max()) + 1
    taught = [np.flatnonzero(episode.support_targets == row) for row in range(way)]
    said = [np.flatnonzero(episode.answers == row) for row in range(way)]
    shots, most = max(map(len, taught)), max(1, *map(len, said))
    step = TILE + GAP
    width, height = step * (shots + most) + 3 * GAP, step * way
    with matplotlib.rc_context(SETTINGS):
        figure = new_figure(max(width + MARGIN, 5.0), height + 2 * MARGIN)
        axis = figure.subplots()
        for row in range(way):
            bottom = (way - 1 - row) * step
            for column, item in enumerate(taught[row]):
                _tile(axis, episode.support[item], column * step, bottom)
            for column, item in enumerate(said[row]):
                left = (shots + column) * step + 2 * GAP
                _tile(axis, episode.query[item], left, bottom)
                _frame(axis, left, bottom, int(episode.query_targets[item]), row)
        axis.axvline(shots * step + GAP / 2, color=INK, linewidth=0.8)
        axis.set_xlim(-GAP, max(width, 5.0 - MARGIN))
        axis.set_ylim(-GAP, height)
        axis.set_aspect("equal")
        axis.set_yticks(
            [(way - 1 - row) * step + TILE / 2 for row in range(way)], map(letter, range(way))
        )
        axis.set_xticks([0.0, (shots) * step + 2 * GAP], ["learnt from", "taken for it"], ha="left")
        axis.tick_params(length=0)
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(fill(in_plot(title, 200), TITLE_LETTERS), loc="left", fontsize=9.5)
    return figure


def write_episode_plot(episode: AnsweredEpisode, stem: Path, *, title: str = "") -> None:
    """Writes `episode_plot` as stem.png and stem.svg."""
    with matplotlib.rc_context(SETTINGS):
        save_figure(episode_plot(episode, title=title), stem)


def letter(row: int) -> str:
    """A class's name in the picture: A to Z, then A1 and so on."""
    turn, place = divmod(row, 26)
    return chr(ord("A") + place) + (str(turn) if turn else "")


def _tile(axis: Axes, picture: FloatArray, left: float, bottom: float) -> None:
    extent = (left, left + TILE, bottom, bottom + TILE)
    if len(picture) == 1:
        axis.imshow(picture[0], cmap="Greys", vmin=0, vmax=1, extent=extent)
    else:
        axis.imshow(np.moveaxis(picture[:3], 0, -1).clip(0, 1), extent=extent)


def _frame(axis: Axes, left: float, bottom: float, target: int, answer: int) -> None:
    right = target == answer
    axis.add_patch(
        Rectangle(
            (left, bottom),
            TILE,
            TILE,
            fill=False,
            edgecolor=RIGHT if right else WRONG,
            linestyle="-" if right else "--",
            linewidth=1.4,
        )
    )
    if not right:
        axis.annotate(
            letter(target),
            (left + TILE, bottom + TILE),
            xytext=(-1.5, -1.5),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            fontweight="bold",
            color=WRONG,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
