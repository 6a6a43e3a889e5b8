"""Printed tables (rich), and the same tables as Markdown."""

from collections.abc import Collection, Mapping, Sequence
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from metalm.analysis.plain_text import in_markdown, shown
from metalm.analysis.statistics.bootstrap import Interval
from metalm.analysis.statistics.featured import featured
from metalm.analysis.statistics.positions import ByPosition
from metalm.analysis.statistics.scores import STATIC, Scores
from metalm.analysis.statistics.summary import best_rival, compare_with_rivals, summarise
from metalm.analysis.statistics.tempered import Tempered, tempered_rows

Cost = Mapping[str, Mapping[str, float]]
ABSENT = "—"
LONGEST_NAME = 80
LONGEST_NOTE = 800
NARROWEST_HEADER = 12


class Grid(NamedTuple):
    """A table before it is drawn: plain text in cells, untrusted and not yet escaped."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def summary_grid(scores: Scores, mode: str) -> Grid:
    """One row a method: perplexity per word, gain with interval, ratio to the best rival."""
    rows = [
        (
            row.method,
            _perplexity(row.perplexity),
            ABSENT if row.gain is None else interval_text(row.gain),
            f"{row.ratio_to_best_rival.estimate:.3f}",
        )
        for row in summarise(scores)
    ]
    header = ("method", "perplexity", "gain [95 % interval]", "ratio to best rival")
    return Grid(f"Perplexity per word and gain: {mode}", header, rows, summary_note(scores))


def summary_note(scores: Scores) -> str:
    """What the figures of the summary count, and what each gain is measured against."""
    own = {m: b for m, b in scores.baselines.items() if m != b and b != STATIC}
    articles = "article" if len(scores.articles) == 1 else "articles"
    exceptions = "".join(f" {m}: against {b}." for m, b in own.items())
    return (
        f"{len(scores.articles):,} {articles}, {scores.num_words.sum():,} words, ends of lines "
        f"included. Perplexity per word; gain in nats per word against {STATIC}, intervals from a "
        f"bootstrap over articles.{exceptions} Best rival: {best_rival(scores)}."
    )


def denominators_grid(scores: Scores, mode: str) -> Grid:
    """One row a method: the perplexity under other ways to count."""
    rows = [
        (
            row.method,
            _perplexity(row.perplexity),
            _perplexity(row.perplexity_without_unknown),
            _perplexity(row.article_weighted_perplexity),
        )
        for row in summarise(scores)
    ]
    header = ("method", "all words", "without <unk>", "articles weighted alike")
    note = f"{scores.num_unknown:,} of {scores.num_words.sum():,} words are <unk>."
    return Grid(f"Perplexity per word, other ways to count: {mode}", header, rows, note)


def tempered_grid(tempered: Tempered, scores: Scores, mode: str) -> Grid:
    """One row a method: its temperature, the perplexity under it, and the gain."""
    rows = [
        (
            row.method,
            f"{row.temperature:.3g}",
            _perplexity(row.perplexity),
            _perplexity(row.perplexity_at_1),
            ABSENT if row.gain is None else interval_text(row.gain),
        )
        for row in tempered_rows(tempered, scores)
    ]
    header = ("method", "temperature", "perplexity", "at temperature 1", "gain [95 % interval]")
    note = (
        "Each method has the temperature of the softmax that is best on validation text. It is for "
        "scoring alone: what is learnt while reading is learnt at temperature 1. Gain in nats per "
        f"word against {STATIC} at its own temperature. Learned mixtures have no temperature."
    )
    return Grid(f"With a temperature tuned on validation: {mode}", header, rows, note)


def rivals_grid(scores: Scores, mode: str, only: Collection[str] | None = None) -> Grid:
    """Perplexity of each of ours over that of each rival, with 95 % intervals; a row a rival.

    Args:
        scores: of one reading mode.
        mode: its name.
        only: which of ours have a column; None for all.
    """
    ratios = {
        method: of_rival
        for method, of_rival in compare_with_rivals(scores).items()
        if only is None or method in only
    }
    rows = [
        (rival, *(interval_text(of_rival[rival]) for of_rival in ratios.values()))
        for rival in scores.rivals
    ]
    return Grid(f"Perplexity over that of each rival: {mode}", ("rival", *ratios), rows)


def growth_grid(bins: ByPosition, mode: str) -> Grid:
    """One row a method: gain in the first and the last bin of position, and the difference."""
    rows = [
        (
            method,
            interval_text(gains[0]),
            interval_text(gains[-1]),
            ABSENT if growth is None else interval_text(growth),
        )
        for (method, gains), growth in zip(bins.gain.items(), bins.growth.values(), strict=True)
    ]
    header = ("method", f"words {bins.labels[0]}", f"words {bins.labels[-1]}", "growth")
    note = f"Gain in nats per word; {bins.num_articles[0]:,} articles in the first bin, "
    note += f"{bins.num_articles[-1]:,} in the last."
    return Grid(f"Growth of the gain along the article: {mode}", header, rows, note)


def articles_grid(scores: Scores, mode: str) -> Grid:
    """One row an article: words and each method's perplexity."""
    perplexities = {m: np.exp(scores.nats(m) / scores.num_words) for m in scores.methods}
    rows = [
        (
            article.title,
            f"{article.num_words:,}",
            *(_perplexity(perplexities[m][i]) for m in scores.methods),
        )
        for i, article in enumerate(scores.articles)
    ]
    return Grid(
        f"perplexity per word by article, {mode}", ("article", "words", *scores.methods), rows
    )


def cost_grid(cost: Cost, mode: str, baseline: str = "static") -> Grid:
    """One row a method: tokens a second, peak memory, both against the static model, fallbacks.

    Args:
        cost: method -> {"tokens_per_second", "peak_memory_bytes", "fallbacks"}, each optional.
        mode: name of the reading mode.
        baseline: the method that the others are divided by.
    """
    reference = cost.get(baseline, {})
    rows = [
        (
            method,
            _measured(measured, reference, "tokens_per_second"),
            _measured(measured, reference, "peak_memory_bytes", 2**-20),
            f"{measured['fallbacks']:,.0f}" if "fallbacks" in measured else ABSENT,
        )
        for method, measured in cost.items()
    ]
    header = ("method", f"tokens/s (of {baseline})", f"peak MiB (of {baseline})", "fallbacks")
    note = (
        "Each method by itself on the beginnings of articles. Peak memory in MiB. Fallbacks, in "
        "the whole reading: how often fast weights blew up and an article fell back to the slow "
        "ones."
    )
    return Grid(f"Cost of reading: {mode}", header, rows, note)


def to_rich(grid: Grid) -> Table:
    """The table for a terminal; markup and control signs in the cells have no effect."""
    table = Table(
        title=Text(shown(grid.title)),
        caption=Text(shown(grid.note, LONGEST_NOTE)) if grid.note else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, name in enumerate(grid.header):
        widest = max((len(row[index]) for row in grid.rows), default=0)
        lines = wrap(shown(name), max(widest, NARROWEST_HEADER))
        justify: JustifyMethod = "left" if index == 0 else "right"
        table.add_column(Text("\n".join(lines)), justify=justify, no_wrap=index == 0)
    for row in grid.rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    return table


def to_markdown(grid: Grid) -> str:
    """The table in Markdown, with its note below; all cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(in_markdown(cell, LONGEST_NAME) for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(grid.header) - 1)
    lines = [line(grid.header), rule, *(line(row) for row in grid.rows)]
    return "\n".join([*lines, "", in_markdown(grid.note, LONGEST_NOTE)]).rstrip() + "\n"


def print_tables(
    scores: Mapping[str, Scores],
    cost: Mapping[str, Cost] | None = None,
    console: Console | None = None,
    tempered: Mapping[str, Tempered] | None = None,
) -> None:
    """Print, for each reading mode, the summary, the comparison with the rivals and the cost.

    Where methods have temperatures, they follow the comparison.

    Where there are many methods, the comparison has the best of ours only: a screen is narrow.
    """
    screen = console or Console()
    only = featured(list(scores.values()), of_each_side=1)
    for mode, of_mode in scores.items():
        screen.print(to_rich(summary_grid(of_mode, mode)))
        if compare_with_rivals(of_mode) and of_mode.rivals:
            screen.print(to_rich(rivals_grid(of_mode, mode, only)))
        if tempered and mode in tempered:
            screen.print(to_rich(tempered_grid(tempered[mode], of_mode, mode)))
        if cost and cost.get(mode):
            screen.print(to_rich(cost_grid(cost[mode], mode)))


def _perplexity(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.2f}" if value < 10_000 else f"{value:.3g}"


def interval_text(interval: Interval) -> str:
    """An estimate with its bounds in brackets; without bounds where there is no interval."""
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _measured(
    measured: Mapping[str, float], reference: Mapping[str, float], key: str, scale: float = 1.0
) -> str:
    if key not in measured:
        return ABSENT
    quotient = f" ({measured[key] / reference[key]:.2f})" if reference.get(key) else ""
    return f"{measured[key] * scale:,.0f}{quotient}"
