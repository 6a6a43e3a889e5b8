"""Checkpoints: one safetensors file, written atomically, with its own checksum; no pickle.

The file holds named tensors and a JSON value (the meta). Its metadata carries the meta, the names
of tensors that are the same tensor (tied), and a SHA-256 over all of it, so that a truncated or
altered file is refused by name.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metalm.training.disk import half_written, partial_of, writing
from metalm.training.processes import first_alone

_FORMAT = "metalm-checkpoint-1"
_ADVICE = "delete it, and the command that wrote it makes it again or continues from an older one"
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint so that the path holds the old file or the new one, never a part.

    Of several processes the first writes what it was given, and all go on once it is there.

    Args:
        path: the file; its folder is made if missing.
        tensors: name -> tensor, on any device; tensors that are one and the same are stored once.
        meta: anything that JSON can hold, with text as keys; numbers come back exactly.

    Raises:
        ValueError: the meta is not JSON; or the disk is full, or the place cannot be written: then
            the old file is as it was.
    """
    first_alone(lambda: save_own(path, tensors, meta))


def save_own(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint as `save` does, of this process alone: a file that no other writes."""
    path = Path(path)
    text = _to_json(path, meta)
    unique, aliases = _untie(tensors)
    header = {"format": _FORMAT, "meta": text, "aliases": json.dumps(aliases, sort_keys=True)}
    header["sha256"] = _digest(unique, header)
    temporary = partial_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(unique, temporary, metadata=header)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and verify it.

    Returns:
        The tensors, on the CPU, each with storage of its own (tied names share one tensor), and
        the meta.

    Raises:
        ValueError: no such file, not a checkpoint of metalm, truncated, or altered; the message
            names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}; expected a file, found "
            f"{'a folder' if path.is_dir() else 'nothing'}; check the path"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            # Cloned: a tensor in the mapped file may lie at an address that selects other kernels.
            unique = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the checkpoint {path} is truncated or altered; expected a safetensors file, found "
            f"'{error}'; {_ADVICE}"
        ) from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this program; expected format {_FORMAT!r}, found "
            f"{header.get('format')!r}; pass a file that metalm wrote"
        )
    expected, found = header.pop("sha256", "none"), _digest(unique, header)
    if expected != found:
        raise ValueError(
            f"the checkpoint {path} was altered; expected sha256 {expected[:16]}, found "
            f"{found[:16]}; {_ADVICE}"
        )
    aliases: dict[str, str] = json.loads(header["aliases"])
    tensors = unique | {name: unique[first] for name, first in aliases.items()}
    return tensors, json.loads(header["meta"])


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return Path(folder) / f"checkpoint-{step:09d}.safetensors"


def saved_steps(folder: Path) -> list[int]:
    """The steps after which the folder holds a checkpoint, in rising order."""
    folder = Path(folder)
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of the folder, or None."""
    steps = saved_steps(folder)
    return step_path(folder, steps[-1]) if steps else None


def save_step(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Save the checkpoint after so many steps, then drop all but the `keep` newest up to it."""
    path = step_path(folder, step)
    save(path, tensors, meta)
    old = [step_path(folder, saved) for saved in saved_steps(folder) if saved <= step][:-keep]
    with writing(folder):
        for file in old:
            file.unlink(missing_ok=True)
    sweep(folder)
    return path


def sweep(folder: Path) -> None:
    """Removes what killed programs left half-written in a folder that holds checkpoints only.

    Safetensors writes under names of its own, which elsewhere may be those of others.

    Raises:
        ValueError: the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        for left in (*half_written(folder), *folder.glob(".tmp??????")):
            left.unlink(missing_ok=True)


def _to_json(path: Path, meta: Mapping[str, Any]) -> str:
    _refuse_keys(meta, path)
    try:
        return json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cannot write {path}: the meta is not JSON ({error}); expected numbers, text, lists "
            "and dicts; put tensors among the tensors (see metalm.training.state.pack)"
        ) from error


def _refuse_keys(value: Any, path: Path) -> None:
    # JSON would turn the key 1 into "1" without a word, and the state would not come back.
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(
                    f"cannot write {path}: the meta has the key {key!r}; expected text, found "
                    f"{type(key).__name__}; use metalm.training.state.pack"
                )
            _refuse_keys(part, path)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _refuse_keys(part, path)


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous on the CPU, with storage of its own; and name -> first name."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first_names:
            aliases[name] = first_names[place]
            continue
        first_names[place] = name
        flat = tensor.cpu().contiguous()
        storage = flat.untyped_storage()
        # safetensors refuses tensors that lie in one storage, so later ones are copied.
        if storage.data_ptr() in storages or storage.nbytes() != flat.numel() * flat.itemsize:
            flat = flat.clone(memory_format=torch.contiguous_format)
        storages.add(flat.untyped_storage().data_ptr())
        unique[name] = flat
    return unique, aliases


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over the header's text and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _sync(path: Path) -> None:
    """Ask the disk to hold what was written, so that a power cut after the rename finds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
