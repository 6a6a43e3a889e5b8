"""The folder of a saved model, in the manner of the hub.

config.json           sizes, the rule's form, tuned settings, origin, and a checksum of each file
model.safetensors     the language model and its rule
tokenizer.json, vocabulary.json    the vocabulary
README.md             the model card
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metalm.language.pretrained_config import PretrainedConfig
from metalm.language.text.vocabulary import DESCRIPTION_FILE, TOKENIZER_FILE, Vocabulary
from metalm.training.configuration import from_json
from metalm.training.disk import file_checksum, writing

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CHECKED = (WEIGHTS, TOKENIZER_FILE, DESCRIPTION_FILE)
FILES = (CONFIG, *CHECKED, CARD)
FORMAT = "metalm-pretrained-1"
_AGAIN = "save or download the model again"


def write(
    folder: Path,
    config: PretrainedConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    card: str,
) -> None:
    """Writes a folder; its config.json comes last, so that it vouches for the others.

    Everything is written beside it first: a disk that fills up leaves what was there.

    Raises:
        ValueError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as place:
            new = Path(place)
            contiguous = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            save_file(contiguous, new / WEIGHTS, metadata={"format": "pt"})
            (new / WEIGHTS).chmod(0o644)
            vocabulary.save(new)
            (new / CARD).write_text(card, encoding="utf-8")
            content = {
                "format": FORMAT,
                "library_name": "metalm",
                "files": {name: file_checksum(new / name) for name in CHECKED},
                **dataclasses.asdict(config),
            }
            text = json.dumps(content, indent=2, default=dict) + "\n"
            (new / CONFIG).write_text(text, encoding="utf-8")
            for name in FILES:
                _bring_to_disk(new / name)
            for name in (*CHECKED, CARD, CONFIG):
                os.replace(new / name, folder / name)


def _bring_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read(folder: Path) -> tuple[PretrainedConfig, dict[str, Tensor], Vocabulary]:
    """Reads a folder that `write` wrote; no code is executed.

    Raises:
        ValueError: it is no such folder, or a file is missing or was altered.
    """
    content = _read_config(folder)
    config = _parse(folder, content)
    for name in CHECKED:
        _check(folder / name, content["files"].get(name))
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            # Cloned: a tensor in the mapped file may lie at an address that selects other kernels.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged; expected a safetensors file, found '{error}'; {_AGAIN}"
        ) from error
    return config, tensors, Vocabulary.load(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no saved model; expected a readable {CONFIG}, found '{error}'; pass a "
            "folder that save_pretrained wrote"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT or not isinstance(content.get("files"), dict):
        kind = content.get("model_type", "none") if isinstance(content, dict) else "none"
        raise ValueError(
            f"{folder} holds no model of metalm; expected the format {FORMAT!r} in {CONFIG}, found "
            f"{found!r} (model_type {kind}); pass a folder that save_pretrained wrote"
        )
    return dict(content)


def _parse(folder: Path, content: Mapping[str, Any]) -> PretrainedConfig:
    settings = {
        field.name: content[field.name]
        for field in dataclasses.fields(PretrainedConfig)
        if field.name in content
    }
    try:
        return from_json(PretrainedConfig, settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be understood; expected the settings of a model, found "
            f"'{error}'; {_AGAIN}, or use the version of metalm that saved it"
        ) from error


def _check(path: Path, recorded: object) -> None:
    if not path.is_file():
        raise ValueError(
            f"a file of the model is missing; expected {path}, found nothing; {_AGAIN}"
        )
    found = file_checksum(path)
    if found != recorded:
        raise ValueError(
            f"{path} is damaged; expected sha256 {str(recorded)[:16]}, found {found[:16]}; {_AGAIN}"
        )
