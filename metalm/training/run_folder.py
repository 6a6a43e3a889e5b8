"""A run's folder: its configuration, and what its stages leave.

configuration.json    what the run was asked for
.lock                 held by the program that works in the folder; .lock-holder.json names it
NAME.safetensors      what a stage left
stages/NAME/          checkpoints and metrics of a training
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metalm.training import checkpoint
from metalm.training.configuration import from_json
from metalm.training.disk import write_at_once, writing

# Where a program runs, not what it is asked for.
_WHERE = {"accumulation", "device", "threads"}


class RunFolder:
    """Paths and files of one run.

    Args:
        folder: made when something is first written.
    """

    HOW_TO_TRAIN = "run train.py with the same options"
    """What to do where a stage has left nothing; "{name}" stands for it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def configuration_path(self) -> Path:
        """Where the configuration lies."""
        return self.folder / "configuration.json"

    def write_configuration(self, config: Any, later: Collection[str] = ()) -> None:
        """Writes the configuration, or checks that it is the one already there.

        Another device, number of threads or of parts of a batch may go on with a run (no longer bit
        for bit).

        Args:
            config: all settings.
            later: names, with dots, of those that matter only after what is done already; where
                they differ, the new ones are written.

        Raises:
            ValueError: the folder belongs to a run with another configuration, or cannot be
                written.
        """
        wanted = _as_json(config)
        if self.configuration_path.exists():
            found = _with_defaults(type(config), self.read_configuration())
            changed = {*_differences(found, wanted)}
            differing = sorted(changed - _WHERE - {*later})
            if differing:
                raise ValueError(
                    f"{self.folder} belongs to another run; expected the same configuration, found "
                    f"other "
                    f"values for {', '.join(differing)}; choose another folder with --run, or "
                    f"repeat that run's "
                    "options to continue it"
                )
            if not changed & {*later}:
                return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_at_once(self.configuration_path, json.dumps(wanted, indent=2) + "\n")

    def read_configuration(self) -> dict[str, Any]:
        """The configuration as JSON.

        Raises:
            ValueError: there is none; the message says what a run's folder looks like.
        """
        try:
            found = json.loads(self.configuration_path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not found:
                raise ValueError("no settings in it")
            return found
        except (OSError, ValueError) as error:
            below = sorted(path.parent.name for path in self.folder.glob("*/configuration.json"))
            advice = f"one of those in it ({', '.join(below)})" if below else "one"
            raise ValueError(
                f"{self.folder} is not the folder of a run; expected a readable "
                f"configuration.json, found '{error}'; pass {advice} that train.py wrote"
            ) from error

    def stage(self, name: str) -> Path:
        """Folder of a training's checkpoints and metrics."""
        return self.folder / "stages" / name

    def weights(self, name: str) -> Path:
        """File of the weights that a stage leaves."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a stage has left its weights."""
        return self.weights(name).exists()

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Writes the weights of a stage."""
        checkpoint.save(self.weights(name), tensors, meta)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads the weights of a stage.

        Raises:
            ValueError: the stage has not finished, or its file is truncated or altered.
        """
        if not self.has(name):
            raise ValueError(
                f"the run {self.folder} has no {name!r} yet; expected {self.weights(name)}, found "
                f"nothing; {self.HOW_TO_TRAIN.format(name=name)}"
            )
        return checkpoint.load(self.weights(name))


def _as_json(config: Any) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def _with_defaults(kind: type[Any], found: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the settings that did not exist when it was written."""
    try:
        return _as_json(from_json(kind, found))
    except (TypeError, ValueError, AttributeError):  # of another version, or no configuration
        return found


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = found.keys() | wanted.keys()
        return [
            item
            for name in names
            for item in _differences(found.get(name), wanted.get(name), f"{path}{name}.")
        ]
    return [] if found == wanted else [path.rstrip(".")]
