"""What consolidation did under several settings: a table in Markdown, and a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metalm.analysis.figures.appearance import (
    COLOURS,
    GREYS,
    MARKERS,
    Look,
    draw_bars,
    draw_line,
    draw_zero,
    new_figure,
    place_legend,
    side_by_side,
)
from metalm.analysis.statistics.bootstrap import Interval

Effects = Mapping[str, Mapping[str, Any]]
"""Name of a setting -> its share and elasticity as "setting", its intervals by what they are of.

An interval is (estimate, low, high): "static, valid", "static, old", "static, old, at the end" are
ratios of perplexities, "gain, GROUP, TOKENS" nats per word.
"""

_STATIC = {
    "static perplexity, of home's: validation": "static, valid",
    "static perplexity, of home's: training articles": "static, old",
    "the same, after the validation articles": "static, old, at the end",
}
_DRAWN = ("valid, related", "valid, not related")


def consolidation_table(
    effects: Effects, groups: Mapping[str, int], beginnings: Sequence[int]
) -> str:
    """Every setting a column, every figure a row.

    Args:
        effects: at least one setting.
        groups: number of articles in each group; empty groups are left out.
        beginnings: tokens of each beginning.
    """
    rows = _STATIC | {
        f"gain, nats a word: {group} ({count}), first {tokens}": f"gain, {group}, {tokens}"
        for group, count in groups.items()
        if count > 0
        for tokens in beginnings
    }
    settings = [of_setting["setting"] for of_setting in effects.values()]
    values = [f"{setting['share']:g}, {setting['elasticity']:g}" for setting in settings]
    lines = ["| | " + " | ".join(effects) + " |", "|---" * (len(effects) + 1) + "|"]
    lines.append("| share, elasticity | " + " | ".join(values) + " |")
    for label, key in rows.items():
        cells = [_text_of(Interval(*of_setting[key])) for of_setting in effects.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_consolidation(
    effects: Effects, groups: Mapping[str, int], beginnings: Sequence[int]
) -> Figure:
    """Gains at the beginnings of related and of other articles, and forgetting.

    Args:
        effects: at most four settings.
        groups: number of articles in each group.
        beginnings: tokens of each beginning.
    """
    figure = new_figure(12.4, 4.9)
    axes = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    axes[1].sharey(axes[0])
    colours = (*COLOURS[:3], GREYS[0])
    for number, ((name, found), shift) in enumerate(
        zip(effects.items(), side_by_side(len(effects)), strict=True)
    ):
        look = Look(colours[number], MARKERS[number], "-", colours[number])
        for axis, group in zip(axes, _DRAWN, strict=False):
            gains = [Interval(*found[f"gain, {group}, {tokens}"]) for tokens in beginnings]
            places = np.arange(len(gains)) + shift
            draw_line(axis, places, [gain.estimate for gain in gains], look, name)
            draw_bars(axis, places, gains, look)
        kept = [Interval(*found[key]) for key in ("static, valid", "static, old")]
        places = np.arange(len(kept)) + shift
        draw_line(axes[2], places, [_percent(k.estimate) for k in kept], look, name, joined=False)
        draw_bars(axes[2], places, [k.map(_percent) for k in kept], look)
    for axis, group in zip(axes, _DRAWN, strict=False):
        axis.set_title(f"{group} ({groups[group]} articles)", loc="left")
        axis.set_xticks(range(len(beginnings)), [f"first {tokens:,}" for tokens in beginnings])
        axis.set_xlabel("tokens of the article")
        draw_zero(axis)
    axes[0].set_ylabel("gain over no consolidation (nats per word)")
    axes[2].set_title("re-read static", loc="left")
    axes[2].set_ylabel("change of perplexity (%); above 0: forgotten")
    axes[2].set_xticks([0, 1], ["validation", "training"])
    draw_zero(axes[2])
    place_legend(figure, list(axes))
    return figure


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _text_of(found: Interval, places: int = 4) -> str:
    estimate, low, high = found
    bounds = "" if low is None else f" ({low:.{places}f} to {high:.{places}f})"
    return f"{estimate:.{places}f}{bounds}"
