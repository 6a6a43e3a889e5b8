"""Several methods on the same tasks: one table, one picture, one file of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalm.analysis.figures.score_plot import write_score_plot
from metalm.analysis.statistics.bootstrap import Interval
from metalm.fewshot.experiment import Result
from metalm.fewshot.scoring import Estimate
from metalm.fewshot.tasks.sources import CURVES
from metalm.training.disk import write_at_once

# Facts that describe the tasks; the others may differ from method to method.
_OF_TASKS = (
    "task",
    "way",
    "shot",
    "query",
    "split",
    "rotations",
    "turned_tests",
    "within_groups",
    "seed",
)


def compare(results: Mapping[str, Result], folder: Path) -> Path:
    """Writes results.json, scores.png and scores.svg; returns the path of the first.

    Args:
        results: method -> what it found, on the same tasks.
        folder: where the files go.
    """
    content = {
        "tasks": tasks_of(results),
        "methods": {
            name: {
                "mean": result.score.mean,
                "margin": result.score.margin,
                "tasks": result.score.tasks,
                "after": {
                    number: {"mean": own.mean, "margin": own.margin}
                    for number, own in result.after.items()
                },
                **{key: result.facts[key] for key in result.facts if key not in _OF_TASKS},
            }
            for name, result in results.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    write_at_once(path, json.dumps(content, indent=1) + "\n")
    unit, scale = unit_of(tasks_of(results))
    intervals = {name: interval(result.score, scale) for name, result in results.items()}
    write_score_plot(intervals, unit, folder / "scores", title=described(tasks_of(results)))
    return path


def table(results: Mapping[str, Result]) -> str:
    """A Markdown table of the methods, and a line that says what they were scored on.

    "Updates" were made on the support set before the queries were answered; where a method was
    scored after other numbers of them as well, each has a column.
    """
    unit, scale = unit_of(tasks_of(results))
    others = sorted({number for result in results.values() for number in result.after})
    columns = [f"{unit} (95 %)", "updates", *(f"after {number}" for number in others)]
    columns = ["method", *columns, "batch normalisation", "steps"]
    lines = [described(tasks_of(results)), "", _row(columns), "|" + "---|" * len(columns)]
    for name, result in results.items():
        facts, updates = result.facts, result.facts.get("updates")
        cells = [name, _number(result.score, scale), "-" if updates is None else f"{updates:,}"]
        cells += [_number(result.after.get(number), scale) for number in others]
        lines.append(_row([*cells, facts["batch_normalisation"], f"{facts['steps']:,}"]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(score: Estimate | None, scale: float) -> str:
    if score is None:
        return "-"
    digits = 2 if scale > 1 else 3  # per cent, or an error
    return f"{scale * score.mean:.{digits}f} ± {scale * score.margin:.{digits}f}"


def tasks_of(results: Mapping[str, Result]) -> dict[str, Any]:
    """What all methods were scored on.

    Raises:
        ValueError: they were scored on different tasks.
    """
    found = [
        {key: result.facts[key] for key in _OF_TASKS} | {"tasks": result.score.tasks}
        for result in results.values()
    ]
    for other in found[1:]:
        differing = sorted(key for key in other if other[key] != found[0][key])
        if differing:
            key = differing[0]
            raise ValueError(
                f"the methods were scored on different tasks; expected {key} = {found[0][key]}, "
                f"found {other[key]}; compare runs on the same tasks"
            )
    return found[0]


def described(tasks: Mapping[str, Any]) -> str:
    """What the tasks are, in one line."""
    count = f"{tasks['tasks']:,} test tasks, seed {tasks['seed']}"
    if tasks["task"] in CURVES:
        return f"{CURVES[tasks['task']]}, {tasks['shot']} points, {tasks['query']} queries; {count}"
    extras = [f"{tasks['split']} split"]
    if tasks["rotations"]:
        extras.append("rotations learnt from")
    if tasks["turned_tests"]:
        extras.append("rotations tested on")
    if tasks["within_groups"]:
        extras.append("within alphabets")
    return (
        f"{Path(tasks['task']).name}, {tasks['way']}-way {tasks['shot']}-shot, {tasks['query']} "
        f"queries a class, {', '.join(extras)}; {count}"
    )


def unit_of(tasks: Mapping[str, Any]) -> tuple[str, float]:
    """What a score is called, and what it is multiplied with to be shown."""
    return ("mean squared error", 1.0) if tasks["task"] in CURVES else ("accuracy, %", 100.0)


def interval(score: Estimate, scale: float) -> Interval:
    """The score as it is shown."""
    return Interval(
        scale * score.mean, scale * (score.mean - score.margin), scale * (score.mean + score.margin)
    )
