"""The report of one evaluation: results.json, plots, and report.md that shows both."""

import json
from collections.abc import Mapping
from pathlib import Path

from metalm.analysis.plain_text import in_markdown
from metalm.analysis.plots import CAPTIONS, draw_all, save_figure
from metalm.analysis.results import SCHEMA, Results, as_json, compute, mode_as_json
from metalm.analysis.scores import Scores, write_at_once
from metalm.analysis.tables import (
    Cost,
    articles_grid,
    cost_grid,
    rivals_grid,
    summary_grid,
    to_markdown,
)


def write_report(
    scores: Mapping[str, Scores],
    folder: str | Path,
    *,
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
) -> Path:
    """Write results.json, plots/*.png and *.svg, and report.md.

    Args:
        scores: reading mode (such as "reset" and "carry") -> the scores of the split in that mode.
        folder: where to write; made if absent, files of an earlier report are replaced.
        configuration: the resolved configuration, nested mappings or dataclasses.
        cost: reading mode -> method -> {"tokens_per_second", "peak_memory_bytes", "fallbacks"},
            each optional; other keys only reach results.json. May be empty.
        command: the command line that gave these results.

    Returns:
        The path of report.md.

    Raises:
        ValueError: if there are no reading modes, or cost names one that was not scored.
    """
    if not scores:
        raise ValueError(
            "there is nothing to report; expected scores of at least one reading mode, found none; "
            "pass a mapping such as {'reset': scores}"
        )
    if not set(cost) <= set(scores):
        raise ValueError(
            f"cost names reading modes without scores; expected some of {sorted(scores)}, found "
            f"{sorted(cost)}; cost maps a reading mode to its methods' costs"
        )
    target = Path(folder)
    results = {mode: compute(of_mode) for mode, of_mode in scores.items()}
    document = {
        "schema": SCHEMA,
        "command": command,
        "configuration": as_json(configuration),
        "modes": {mode: mode_as_json(of_mode) for mode, of_mode in results.items()},
        "cost": as_json(cost),
    }
    content = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=True)
    write_at_once(target / "results.json", content.encode())
    names = []
    for name, figure in draw_all(results):
        save_figure(figure, target / "plots" / name)
        names.append(name)
    page = target / "report.md"
    write_at_once(page, _page(results, names, configuration, cost, command).encode())
    return page


def _page(
    results: Mapping[str, Results],
    plots: list[str],
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
) -> str:
    parts = ["# What was remembered while reading\n", _code(command)]
    for mode, of_mode in results.items():
        parts += [f"## Reading mode: {in_markdown(mode)}\n"]
        parts += [to_markdown(summary_grid(of_mode.scores, mode))]
        if of_mode.scores.ours and of_mode.scores.rivals:
            parts += ["Perplexity over that of each rival, with 95 % intervals:\n"]
            parts += [to_markdown(rivals_grid(of_mode.scores, mode))]
        if cost.get(mode):
            parts += ["Cost of reading:\n", to_markdown(cost_grid(cost[mode], mode))]
    for name in plots:
        parts += [f"## {CAPTIONS[name].title}\n", f"![{CAPTIONS[name].title}](plots/{name}.png)\n"]
        parts += [CAPTIONS[name].text + "\n"]
    for mode, of_mode in results.items():
        parts += [f"## Articles, reading mode: {in_markdown(mode)}\n"]
        parts += [to_markdown(articles_grid(of_mode.scores, mode))]
    settings = json.dumps(as_json(configuration), indent=2, allow_nan=False)
    parts += ["## Configuration\n", _code(settings)]
    parts += ["All numbers are in [results.json](results.json), which documents its own fields.\n"]
    return "\n".join(parts)


def _code(text: str) -> str:
    """An indented code block, in which Markdown has no meaning and which no text can close."""
    clean = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return "".join(f"    {line}\n" for line in clean.splitlines()) or "    \n"
