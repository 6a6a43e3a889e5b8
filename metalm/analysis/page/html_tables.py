"""The tables of one reading mode as HTML; every cell is escaped."""

from __future__ import annotations

import html
from collections.abc import Collection

from metalm.analysis.plain_text import shown
from metalm.analysis.statistics.results import Results
from metalm.analysis.tables import (
    LONGEST_NAME,
    LONGEST_NOTE,
    Cost,
    Grid,
    articles_grid,
    cost_grid,
    denominators_grid,
    growth_grid,
    rivals_grid,
    summary_grid,
)


def tables(results: Results, mode: str) -> str:
    """The summary, and the other tables folded up."""
    scores = results.scores
    best = min(scores.methods, key=scores.perplexity)
    parts = [to_html(summary_grid(scores, mode), strong={best})]
    if results.by_position_rivals is not None:
        parts.append(folded(rivals_grid(scores, mode)))
    if scores.adaptive:
        parts.append(folded(growth_grid(results.by_position_cohort or results.by_position, mode)))
    parts.append(folded(denominators_grid(scores, mode)))
    parts.append(folded(articles_grid(scores, mode)))
    return "".join(parts)


def cost_table(cost: Cost, mode: str) -> str:
    """What reading cost, folded up."""
    return folded(cost_grid(cost, mode))


def folded(grid: Grid) -> str:
    """A table under its title, which opens it."""
    summary = f"<summary>{_text(grid.title)}</summary>"
    return f"<details>{summary}\n{to_html(grid, titled=False)}</details>\n"


def to_html(grid: Grid, *, titled: bool = True, strong: Collection[str] = ()) -> str:
    """A table that scrolls sideways where the window is narrow, with its note below.

    Args:
        grid: plain text in cells.
        titled: whether the title stands above it.
        strong: first cells of the rows that are set in bold.
    """
    caption = f"<caption>{_text(grid.title)}</caption>" if titled else ""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in grid.header)
    body = "".join(
        f"<tr{' class=strong' if row[0] in strong else ''}>"
        f'<th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in grid.rows
    )
    note = f'<p class="note">{_text(grid.note, LONGEST_NOTE)}</p>' if grid.note else ""
    return (
        f'<div class="wide" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n{note}\n"
    )


def _text(text: str, limit: int = LONGEST_NAME) -> str:
    return html.escape(shown(text, limit))
