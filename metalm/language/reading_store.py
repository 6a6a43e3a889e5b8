"""Finished readings on disk, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metalm.language.reading import Readings


class ReadingStore:
    """Readings of one split in one mode, one file each.

    Args:
        folder: made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, description: Mapping[str, Any]) -> Path:
        text = json.dumps(description, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"

    def get(
        self, description: Mapping[str, Any], lengths: Sequence[int]
    ) -> tuple[Readings, dict[str, float]] | None:
        """The reading of that description and its cost; None if it was not finished.

        Args:
            description: everything that the scores depend on, as JSON values.
            lengths: tokens of each text.
        """
        path = self._path(description)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            cuts = np.cumsum(lengths)[:-1]
            nats, cache = file["nats"], file["cache"]
        if len(nats) != sum(lengths):
            raise ValueError(
                f"{path} is of another text; expected {sum(lengths)} tokens, found {len(nats)}; "
                "delete it to read again"
            )
        readings = Readings(
            np.split(nats, cuts),
            np.split(cache, cuts, axis=1) if len(cache) else [],
            meta["fallbacks"],
            meta["seconds"],
        )
        return readings, meta["cost"]

    def put(
        self, description: Mapping[str, Any], readings: Readings, cost: Mapping[str, float]
    ) -> None:
        """Keeps a finished reading."""
        path = self._path(description)
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "description": dict(description),
            "fallbacks": readings.fallbacks,
            "seconds": readings.seconds,
            "cost": dict(cost),
        }
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            np.savez(
                file,
                meta=np.array(json.dumps(meta)),
                nats=np.concatenate(readings.nats),
                cache=np.concatenate(readings.cache, axis=1)
                if readings.cache
                else np.zeros((0, 0)),
            )
        os.replace(temporary, path)
