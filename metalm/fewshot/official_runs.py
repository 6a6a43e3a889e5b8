"""The one-shot challenge that comes with Omniglot (Lake et al. 2015), scored from its folder.

    run01 ... run20/
      class_labels.txt        a line for every test: test/item01.png training/class05.png
      test/item01.png ...     20 pictures of 105 x 105 pixels, black ink
      training/class01.png ...

A run is one 20-way one-shot task within an alphabet: all training pictures by one drawer, all tests
by another. The published file writes the run's name before the paths; both forms are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.tasks.resize import resized

LABELS = "class_labels.txt"
SIDE = 105

Judge = Callable[[Tensor, Tensor], Tensor]
"""From training and test pictures, uint8 [pictures, 105, 105] with ink = 255, to scores [tests,
training]; the largest of a row is the answer."""


class Run(NamedTuple):
    """One task of the challenge.

    Attributes:
        name: such as run01.
        training: uint8 [classes, 105, 105], ink = 255, by the names of their files.
        tests: uint8 [tests, 105, 105].
        answers: position in `training` of the class of every test, [tests].
    """

    name: str
    training: Tensor
    tests: Tensor
    answers: Tensor


class RunScores(NamedTuple):
    """Share of wrong answers, in percent.

    Attributes:
        names: of the runs.
        errors: of each run.
        mean: over the runs.
    """

    names: tuple[str, ...]
    errors: tuple[float, ...]
    mean: float


def read_runs(folder: Path) -> list[Run]:
    """Every run of a folder, in order.

    Raises:
        ValueError: a run or a file is missing, or is not what it should be.
    """
    found = sorted(
        path for path in Path(folder).glob("run*") if re.fullmatch(r"run\d\d", path.name)
    )
    expected = [f"run{number + 1:02}" for number in range(len(found))]
    if not found or [path.name for path in found] != expected:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{folder} does not hold the official runs; expected folders run01, run02, ... without "
            f"a gap (20 in the challenge), found {names}; unpack all_runs.zip there"
        )
    return [_read_run(path) for path in found]


def score_runs(runs: Sequence[Run], judge: Judge) -> RunScores:
    """Errors of a judge, who is not shown the answers."""
    errors = []
    for run in runs:
        chosen = judge(run.training, run.tests).argmax(1).cpu()
        errors.append(100 * float((chosen != run.answers).double().mean()))
    return RunScores(tuple(run.name for run in runs), tuple(errors), sum(errors) / len(errors))


def judge_of(method: FewShotMethod, size: int, device: torch.device | str | None = None) -> Judge:
    """A few-shot method as a judge: the training pictures are its support, one a class.

    Args:
        method: of at least as many ways as a run has classes.
        size: pixels of a side that the method takes.
        device: where the method is.
    """

    def judge(training: Tensor, tests: Tensor) -> Tensor:
        support, query = (
            torch.from_numpy(resized(pictures[:, None].numpy(), size)).to(device).float() / 255
            for pictures in (training, tests)
        )
        targets = torch.arange(len(training), device=device)
        return method.predict(support[None], targets[None], query[None])[0]

    return judge


def _read_run(folder: Path) -> Run:
    pairs = _read_pairs(folder)
    classes = _pictures(folder, "training", {training for _, training in pairs})
    _pictures(folder, "test", {test for test, _ in pairs})
    return Run(
        folder.name,
        torch.stack([_read_picture(path) for path in classes]),
        torch.stack([_read_picture(path) for path, _ in pairs]),
        torch.tensor([classes.index(training) for _, training in pairs]),
    )


def _read_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Test picture and training picture of the same class, for every line of the labels."""
    path = folder / LABELS
    if not path.is_file():
        raise ValueError(
            f"a run is incomplete; expected {path}, found no such file; unpack all_runs.zip again"
        )
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        names = [name.removeprefix(f"{folder.name}/") for name in line.split()]
        if not names:
            continue
        kinds = [name.split("/")[0] for name in names]
        if kinds != ["test", "training"]:
            raise ValueError(
                f"line {number} of {path} is not a pair; expected 'test/item01.png "
                f"training/class05.png', found {line.strip()!r}; correct it"
            )
        pairs.append((folder / names[0], folder / names[1]))
    tests = {test for test, _ in pairs}
    if not pairs or len(tests) < len(pairs):
        raise ValueError(
            f"{path} does not name every test once; expected different tests, found {len(pairs)} "
            f"lines for {len(tests)}; correct it"
        )
    return pairs


def _pictures(folder: Path, kind: str, named: set[Path]) -> list[Path]:
    """The pictures of a kind in order; the labels must name each, lest a task become easier."""
    there = {*(folder / kind).glob("*.png")}
    if there != named:
        missing = ", ".join(sorted(path.name for path in there ^ named))
        raise ValueError(
            f"{folder / LABELS} and the pictures in {folder / kind} are not the same; expected "
            f"every one in both, found in one alone {missing}; unpack all_runs.zip again"
        )
    return sorted(there)


def _read_picture(path: Path) -> Tensor:
    """One picture, uint8 [105, 105] with ink = 255."""
    try:
        with Image.open(path) as image:
            grey = np.array(image.convert("L"))
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"no picture ({error})"
        raise ValueError(
            f"a picture of the challenge is missing; expected a PNG at {path}, found {found}; "
            "unpack all_runs.zip again"
        ) from error
    if grey.shape != (SIDE, SIDE):
        raise ValueError(
            f"{path} has another size; expected {SIDE} x {SIDE} pixels, found "
            f"{grey.shape[1]} x {grey.shape[0]}; use the official pictures"
        )
    return torch.from_numpy(255 - grey)
