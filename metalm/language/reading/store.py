"""Readings on disk, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metalm.language.reading.curves import Curves
from metalm.language.reading.reader import Readings
from metalm.language.reading.unfinished import Unfinished
from metalm.training import checkpoint
from metalm.training.processes import is_first

_UNFINISHED = "unfinished-"


class ReadingStore:
    """Readings of one split in one mode, one file each, written whole and with a checksum.

    Args:
        folder: made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, description: Mapping[str, Any]) -> Path:
        return self.folder / f"{_digest(description)}.safetensors"

    def unfinished(self, descriptions: Sequence[Mapping[str, Any]]) -> Unfinished:
        """Where a reading is kept while it goes on, by one method or by several side by side."""
        several = {"readings": [dict(description) for description in descriptions]}
        return Unfinished(self.folder / f"{_UNFINISHED}{_digest(several)}.safetensors", several)

    def forget_unfinished(self) -> None:
        """Removes what is left of readings that were finished since, half-written files too."""
        if is_first():
            for path in self.folder.glob(f"{_UNFINISHED}*.safetensors"):
                path.unlink(missing_ok=True)
            checkpoint.sweep(self.folder)

    def get(self, description: Mapping[str, Any], lengths: Sequence[int]) -> Readings | None:
        """The reading of that description; None if it was not finished.

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
        sure = tensors["confidence"].numpy()
        tempered = tensors["tempered"].numpy() if "tempered" in tensors else ()
        return Readings(
            nats=np.split(nats, cuts),
            cache=np.split(cache, cuts, axis=1) if len(cache) else [],
            confidence=np.split(sure, cuts, axis=1) if len(sure) else [],
            tempered=np.split(tempered, cuts, axis=1) if len(tempered) else [],
            fallbacks=meta["fallbacks"],
            seconds=meta["seconds"],
            curves=_curves(tensors, meta.get("curves", [])),
        )

    def put(self, description: Mapping[str, Any], readings: Readings) -> None:
        """Keeps a finished reading."""
        nothing = np.zeros((0, 0), dtype=np.float32)
        cache, sure = (
            np.concatenate(found, axis=1) if found else nothing
            for found in (readings.cache, readings.confidence)
        )
        tempered = {}
        if readings.tempered:
            tempered["tempered"] = torch.from_numpy(np.concatenate(readings.tempered, axis=1))
        checkpoint.save(
            self._path(description),
            {
                "nats": torch.from_numpy(np.concatenate(readings.nats)),
                "cache": torch.from_numpy(cache),
                "confidence": torch.from_numpy(sure),
                **tempered,
                **_curve_tensors(readings.curves),
            },
            {
                "description": dict(description),
                "fallbacks": readings.fallbacks,
                "seconds": readings.seconds,
                "curves": [
                    {
                        "quantity": c.quantity,
                        "names": c.names,
                        "samples": [len(p) for p in c.places],
                    }
                    for c in readings.curves
                ],
            },
        )


def _digest(description: Mapping[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _curve_tensors(curves: Sequence[Curves]) -> dict[str, torch.Tensor]:
    tensors = {}
    for curve in curves:
        tensors[f"{curve.quantity}.places"] = torch.from_numpy(np.concatenate(curve.places))
        tensors[f"{curve.quantity}.values"] = torch.from_numpy(np.concatenate(curve.values))
    return tensors


def _curves(tensors: Mapping[str, torch.Tensor], kept: Sequence[Mapping[str, Any]]) -> list[Curves]:
    found = []
    for curve in kept:
        cuts = np.cumsum(curve["samples"])[:-1]
        places, values = (tensors[f"{curve['quantity']}.{n}"].numpy() for n in ("places", "values"))
        names = tuple(curve["names"])
        found.append(
            Curves(curve["quantity"], names, np.split(places, cuts), np.split(values, cuts))
        )
    return found
