"""The report of one evaluation: results.json, report.html, and report.md with plots as files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from metalm.analysis.figures.appearance import save_figure
from metalm.analysis.figures.plots import CAPTIONS, draw_all, left_out
from metalm.analysis.page.html_page import build_page
from metalm.analysis.plain_text import in_markdown
from metalm.analysis.statistics.results import (
    SCHEMA,
    TEMPERED_SCHEMA,
    Results,
    as_json,
    compute,
    mode_as_json,
)
from metalm.analysis.statistics.scores import Scores
from metalm.analysis.statistics.succession import Succession, letter
from metalm.analysis.statistics.tempered import Tempered, tempered_rows
from metalm.analysis.statistics.traces import Trace
from metalm.analysis.tables import (
    Cost,
    articles_grid,
    cost_grid,
    denominators_grid,
    growth_grid,
    rivals_grid,
    summary_grid,
    tempered_grid,
    to_markdown,
)
from metalm.analysis.whole_file import write_at_once

Traces = Mapping[str, Sequence[Trace]]
"""Reading mode -> what was recorded while reading in it."""

PAGE = "report.html"


def write_report(
    scores: Mapping[str, Scores],
    folder: str | Path,
    *,
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
    title: str | None = None,
    traces: Traces | None = None,
    tempered: Mapping[str, Tempered] | None = None,
) -> Path:
    """Write results.json, report.html, plots/*.png and *.svg, and report.md.

    Args:
        scores: reading mode (such as "reset" and "carry") -> the scores of the split in that mode.
        folder: where to write; made if absent, files of an earlier report are replaced.
        configuration: the resolved configuration, nested mappings or dataclasses.
        cost: reading mode -> method -> {"tokens_per_second", "peak_memory_bytes", "fallbacks"},
            each optional; other keys only reach results.json. May be empty.
        command: the command line that gave these results.
        title: what report.html is called; by default after the folder.
        traces: reading mode -> curves recorded while reading, which report.html shows.
        tempered: reading mode -> the methods once more, under temperatures of their own.

    Returns:
        The path of report.md.

    Raises:
        ValueError: if there are no reading modes, or cost or traces name one that was not scored.
    """
    target = Path(folder)
    warm = tempered or {}
    results = _write_page(scores, target, configuration, cost, command, title, traces, warm)
    names = []
    for name, figure in draw_all(results):
        save_figure(figure, target / "plots" / name)
        names.append(name)
    page = target / "report.md"
    write_at_once(page, _page(results, names, configuration, cost, command, warm).encode())
    return page


def write_page(
    scores: Mapping[str, Scores],
    folder: str | Path,
    *,
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
    title: str | None = None,
    traces: Traces | None = None,
    tempered: Mapping[str, Tempered] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write results.json and report.html only; everything else as in `write_report`.

    The page says the notes before its tables, a paragraph each.

    Returns:
        The path of report.html.
    """
    target = Path(folder)
    _write_page(scores, target, configuration, cost, command, title, traces, tempered or {}, notes)
    return target / PAGE


def _write_page(
    scores: Mapping[str, Scores],
    target: Path,
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
    title: str | None,
    traces: Traces | None,
    tempered: Mapping[str, Tempered],
    notes: Sequence[str] = (),
) -> dict[str, Results]:
    _check(scores, cost, "cost")
    _check(scores, tempered, "tempered")
    _check(scores, traces or {}, "traces")
    results = {mode: compute(of_mode) for mode, of_mode in scores.items()}
    document = {
        "schema": SCHEMA,
        "command": command,
        "configuration": as_json(configuration),
        "modes": {mode: mode_as_json(of_mode) for mode, of_mode in results.items()},
        "cost": as_json(cost),
    }
    if tempered:
        document["schema"] = SCHEMA | TEMPERED_SCHEMA
        document["tempered"] = {
            mode: as_json(tempered_rows(of_mode, scores[mode]))
            for mode, of_mode in tempered.items()
        }
    content = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=True)
    write_at_once(target / "results.json", content.encode())
    page = build_page(
        results,
        title=title or f"{target.resolve().parent.name}: {target.name}",
        configuration=configuration,
        cost=cost,
        command=command,
        traces=traces,
        tempered=tempered,
        notes=notes,
    )
    write_at_once(target / PAGE, page.encode())
    return results


def _check(scores: Mapping[str, Scores], given: Mapping[str, object], name: str) -> None:
    if not scores:
        raise ValueError(
            "there is nothing to report; expected scores of at least one reading mode, found none; "
            "pass a mapping such as {'reset': scores}"
        )
    if not set(given) <= set(scores):
        raise ValueError(
            f"{name} names reading modes without scores; expected some of {sorted(scores)}, found "
            f"{sorted(given)}; {name} maps a reading mode to what belongs to its methods"
        )


def _page(
    results: Mapping[str, Results],
    plots: list[str],
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
    tempered: Mapping[str, Tempered],
) -> str:
    parts = ["# What was remembered while reading\n", _code(command)]
    for mode, of_mode in results.items():
        parts += [
            f"## Reading mode: {in_markdown(mode)}\n",
            *_tables(mode, of_mode, cost, tempered),
        ]
    for name in plots:
        title, text = CAPTIONS[name]
        parts += [
            f"## {title}\n",
            f"![{title}](plots/{name}.png)\n",
            text + left_out(name, results) + "\n",
        ]
        if name == "gain_along_articles":
            parts += [_letters(next(iter(results.values())).succession)]
    for mode, of_mode in results.items():
        parts += [f"## Articles, reading mode: {in_markdown(mode)}\n"]
        parts += [to_markdown(articles_grid(of_mode.scores, mode))]
    settings = json.dumps(as_json(configuration), indent=2, allow_nan=False)
    parts += ["## Configuration\n", _code(settings)]
    parts += ["All numbers are in [results.json](results.json), which documents its own fields; "]
    parts[-1] += "[report.html](report.html) has the curves to explore and every word's loss.\n"
    return "\n".join(parts)


def _tables(
    mode: str,
    results: Results,
    cost: Mapping[str, Cost],
    tempered: Mapping[str, Tempered],
) -> list[str]:
    grids = [summary_grid(results.scores, mode)]
    if results.by_position_rivals is not None:
        grids += [rivals_grid(results.scores, mode)]
    if results.scores.adaptive:
        grids += [growth_grid(results.by_position_cohort or results.by_position, mode)]
    grids += [denominators_grid(results.scores, mode)]
    if mode in tempered:
        grids += [tempered_grid(tempered[mode], results.scores, mode)]
    if cost.get(mode):
        grids += [cost_grid(cost[mode], mode)]
    return [
        part for grid in grids for part in (f"**{in_markdown(grid.title)}**\n", to_markdown(grid))
    ]


def _letters(course: Succession) -> str:
    """Which article each letter stands for."""
    named = (
        f"{letter(index)}: {in_markdown(title)} ({end - start:,} words)"
        for index, (title, (start, end)) in enumerate(zip(course.titles, course.spans, strict=True))
    )
    return f"Mean over {course.window:,} words. " + "; ".join(named) + ".\n"


def _code(text: str) -> str:
    """An indented code block, in which Markdown has no meaning and which no text can close."""
    clean = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return "".join(f"    {line}\n" for line in clean.splitlines()) or "    \n"
