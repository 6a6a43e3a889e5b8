"""The words after `train.py fewshot`: which methods, on which tasks, with which settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from metalm.fewshot.comparison import compare, table
from metalm.fewshot.experiment import Result, load, score, train
from metalm.fewshot.hausdorff import hausdorff_scores
from metalm.fewshot.method_names import all_names, most_ways, names_of_methods
from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.official_runs import RunScores, judge_of, read_runs, score_runs
from metalm.fewshot.presets import FewShotConfig, preset, within_classes
from metalm.fewshot.shown_tasks import draw_tasks
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.sources import CURVES, draw_pictures
from metalm.fewshot.tasks.stored_images import open_images
from metalm.training.configuration import from_json
from metalm.training.devices import use_device
from metalm.training.disk import write_at_once, writing
from metalm.training.folder_lock import only_program_in
from metalm.training.run_folder import RunFolder

_METHOD = "prototypical"
_EXAMPLES = """
  python train.py fewshot                               # drawn glyphs, no download
  python train.py fewshot --task sine --method maml
  python train.py fewshot --task omniglot --method maml --way 5 --shot 1
  python train.py fewshot --task FOLDER --method all    # folders of pictures, one a class
  python train.py fewshot --method maml --adaptation.order 1 --training.steps 500
"""


class Asked(NamedTuple):
    """What was asked for."""

    configs: list[FewShotConfig]
    """One a method."""
    folder: Path
    """Of all of them; each has a folder of its own in it."""
    dry_run: bool
    """Whether only the settings are wanted."""
    own_way: bool
    """Whether the ways in training were asked for, rather than a preset's choice."""


def parse(arguments: Sequence[str]) -> Asked:
    """The configurations that a command line asks for.

    Raises:
        ValueError: a method that does not exist; the message lists the names.
    """
    parser = argparse.ArgumentParser(
        prog="python train.py fewshot",
        description="Learn to learn from few examples, and score it on classes never seen.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
        epilog="Any setting of the configuration may follow (--dry-run prints them all).\n"
        + _EXAMPLES,
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=[_METHOD],
        help=_lines(f"one or several of {', '.join(all_names())}, or all (default: {_METHOD})"),
    )
    parser.add_argument(
        "--task",
        default="glyphs",
        help=_lines("sine, linear, glyphs, omniglot, or a folder of class folders"),
    )
    parser.add_argument("--way", type=int, help="classes of a task (default: 5; not for curves)")
    parser.add_argument(
        "--shot", type=int, help=_lines("support items of a class (default: 1; of a curve: 5)")
    )
    parser.add_argument("--run", type=Path, help="where the runs go (default: below runs/)")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and stop")
    options, overrides = parser.parse_known_args(arguments)
    shot = options.shot if options.shot is not None else 5 if options.task in CURVES else 1
    if options.task in CURVES and options.way is not None:
        raise ValueError(
            f"curves have no classes; expected no --way for {options.task!r}, found {options.way}; "
            "leave it out"
        )
    way = options.way if options.way is not None else 5
    known = names_of_methods(options.task)
    methods = known if options.method == ["all"] else options.method
    for name in methods:
        if name not in known:
            raise ValueError(
                f"no such method for {options.task!r}; expected one of {', '.join(known)}, or all, "
                f"found {name!r}; choose one of them"
            )
    configs = [
        tyro.cli(
            FewShotConfig,
            args=overrides,
            default=preset(name, options.task, way, shot),
            prog="python train.py fewshot",
        )
        for name in methods
    ]
    own_way = any(word.partition("=")[0] == "--training.way" for word in overrides)
    return Asked(configs, options.run or _folder(configs[0]), options.dry_run, own_way)


def _lines(text: str) -> str:
    """Short enough for a terminal of 80 columns; argparse would break names at their hyphens."""
    return textwrap.fill(text, 54, break_on_hyphens=False)


def shown(configs: Sequence[FewShotConfig]) -> list[dict[str, object]]:
    """The settings as JSON values."""
    return [dataclasses.asdict(config) for config in configs]


def _folder(config: FewShotConfig) -> Path:
    task = config.task
    size = f"{task.shot}-shot" if task.source in CURVES else f"{task.way}-way-{task.shot}-shot"
    return Path("runs") / f"{Path(task.source).name}-{size}"


def pictures_of(config: FewShotConfig, prepare: Callable[..., Path]) -> LabelledImages | None:
    """The pictures of the tasks, prepared if need be; None for curves.

    Args:
        config: says which.
        prepare: finds or makes the prepared folder of a source.
    """
    task = config.task
    if task.source in CURVES:
        return None
    if task.source == "glyphs":
        return draw_pictures(task.size)
    folder = prepare(
        task.source,
        size=task.size,
        channels=task.channels,
        dark_ink=task.dark_ink,
        root=config.root,
    )
    return open_images(folder)


def run(arguments: Sequence[str], prepare: Callable[..., Path]) -> int:
    """Trains and scores every method that is asked for, and compares them; the exit status.

    Args:
        arguments: the words after `train.py fewshot`.
        prepare: see `pictures_of`.

    Raises:
        ValueError: wrong input, or a disk that refuses.
    """
    asked = parse(arguments)
    print(json.dumps(shown(asked.configs), indent=2))
    if asked.dry_run:
        return 0
    first = asked.configs[0]
    use_device(first.device)
    _use_threads(first.threads)
    images = pictures_of(first, prepare)
    results: dict[str, Result] = {}
    for config in asked.configs if asked.own_way else _fitted(asked.configs, images):
        folder = RunFolder(asked.folder / config.method)
        with only_program_in(folder.folder), writing(folder.folder):
            method = train(config, folder, images)
            results[config.method] = score(config, method, folder, images)
            draw_tasks(config, method, folder.folder, images)
    with only_program_in(asked.folder), writing(asked.folder):
        path = compare(results, asked.folder)
    print(table(results))
    print(f"results: {path}")
    return 0


def _fitted(configs: Sequence[FewShotConfig], images: LabelledImages | None) -> list[FewShotConfig]:
    """The presets with ways that the pictures allow; says where that changes one."""
    fitted = [within_classes(config, images) for config in configs]
    for before, after in zip(configs, fitted, strict=True):
        if after != before:
            print(
                f"{after.method}: trained {after.training.way}-way and not "
                f"{before.training.way}-way, as there are no more classes to learn from"
                + (" in a group" if after.task.within_groups else "")
            )
    return fitted


def evaluate(
    folder: RunFolder | None,
    prepare: Callable[..., Path],
    official_runs: Path | None = None,
    *,
    threads: int = 0,
    device: str | None = None,
) -> str:
    """Scores a trained run again, or on the official one-shot challenge; returns what to print.

    Args:
        folder: of one method; None for the modified Hausdorff distance, which learns nothing.
        prepare: see `pictures_of`.
        official_runs: folder of the challenge (see `official_runs.py`); None for test tasks.
        threads: processor threads; 0 takes the run's.
        device: where tensors live; None for where the run was trained.

    Raises:
        ValueError: the run is not trained, there is no such device, another program works in its
            folder, or the challenge is not what it should be.
    """
    if folder is None:
        assert official_runs is not None
        _use_threads(threads)
        return errors(score_runs(read_runs(official_runs), hausdorff_scores))
    config = from_json(FewShotConfig, folder.read_configuration())
    config = dataclasses.replace(config, device=device or config.device)
    use_device(config.device)
    _use_threads(threads or config.threads)
    images = pictures_of(config, prepare)
    with only_program_in(folder.folder), writing(folder.folder):
        method = load(config, folder, images)
        if official_runs is not None:
            found_errors = _challenged(config, method, folder, images, official_runs)
            return f"{errors(found_errors)}\nbatch normalisation: {method.statistics}"
        found = table({config.method: score(config, method, folder, images)})
        drawn = draw_tasks(config, method, folder.folder, images)
    return f"{found}\npicture: {drawn}"


def _use_threads(number: int) -> None:
    """So many processor threads; 0 leaves torch's own choice."""
    if number > 0:
        torch.set_num_threads(number)


def _challenged(
    config: FewShotConfig,
    method: FewShotMethod,
    folder: RunFolder,
    images: LabelledImages | None,
    official_runs: Path,
) -> RunScores:
    """Scores a method on the official challenge and writes official-runs.json."""
    if images is None or images.shape[0] != 1:
        raise ValueError(
            "the challenge is made of black strokes on white; expected a method for pictures of "
            f"one channel, found one for {config.task.source!r}; train one on omniglot, or on grey "
            "pictures (--task.channels 1, and --task.dark-ink for dark ones on light)"
        )
    _check_split(config, images)
    challenge = read_runs(official_runs)
    _check_ways(config, max(len(each.training) for each in challenge))
    runs = score_runs(challenge, judge_of(method, config.task.size, config.device))
    content = {
        "errors": dict(zip(runs.names, runs.errors, strict=True)),
        "mean": runs.mean,
        "batch_normalisation": method.statistics,
    }
    write_at_once(folder.folder / "official-runs.json", json.dumps(content, indent=1) + "\n")
    return runs


def _check_split(config: FewShotConfig, images: LabelledImages) -> None:
    """Refuses a run that may have learnt from the challenge: other pictures have no such parts."""
    if images.parts is not None and config.task.split != "official":
        raise ValueError(
            "the challenge is made of characters of Omniglot's evaluation set, which this run may "
            "have learnt from; expected a run on the official split, found one whose classes were "
            f"dealt at random from both sets (--task.split {config.task.split}); train one with "
            "--task.split official, in a folder of its own (--run)"
        )


def _check_ways(config: FewShotConfig, classes: int) -> None:
    ways = most_ways(config)
    if ways is not None and ways < classes:
        raise ValueError(
            f"{config.method} was trained for tasks of fewer classes than the challenge has; "
            f"expected {classes} ways, found {ways}; train one with --way {classes}"
        )


def errors(found: RunScores) -> str:
    """A line a run, and the mean."""
    lines = [
        f"{name}: {error:.1f} %" for name, error in zip(found.names, found.errors, strict=True)
    ]
    return "\n".join([*lines, f"mean error of {len(lines)} runs: {found.mean:.1f} %"])
