"""Finished readings on disk, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metalm.language.reading import Readings
from metalm.training import checkpoint


class ReadingStore:
    """Readings of one split in one mode, one file each, written whole and with a checksum.

    Args:
        folder: made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, description: Mapping[str, Any]) -> Path:
        text = json.dumps(description, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def get(
        self, description: Mapping[str, Any], lengths: Sequence[int]
    ) -> tuple[Readings, dict[str, float]] | None:
        """The reading of that description and its cost; None if it was not finished.

        Args:
            description: everything that the scores depend on, as JSON values.
            lengths: tokens of each text.

        Raises:
            ValueError: the file is truncated, altered or of another reading.
        """
        path = self._path(description)
        if not path.exists():
            return None
        tensors, meta = checkpoint.load(path)
        if meta.get("description") != description:
            raise ValueError(
                f"{path} is not the reading that its name says; expected one of "
                f"{dict(description)}, found {meta.get('description')}; delete it to read again"
            )
        cuts = np.cumsum(lengths)[:-1]
        nats, cache = tensors["nats"].numpy(), tensors["cache"].numpy()
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
        cache = np.concatenate(readings.cache, axis=1) if readings.cache else np.zeros((0, 0))
        checkpoint.save(
            self._path(description),
            {
                "nats": torch.from_numpy(np.concatenate(readings.nats)),
                "cache": torch.from_numpy(cache),
            },
            {
                "description": dict(description),
                "fallbacks": readings.fallbacks,
                "seconds": readings.seconds,
                "cost": dict(cost),
            },
        )
