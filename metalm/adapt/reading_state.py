"""Where a reading stands: what the weights have become, and what goes on from there. On disk too.

A state is one safetensors file with a checksum; loading it executes no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metalm.meta.parameters import Parameters
from metalm.meta.tree import formed, transform
from metalm.meta.update_rule import AbstractUpdateRule, RuleState
from metalm.training import checkpoint
from metalm.training.state import pack, unpack

_KIND = "metalm-reading-state-1"


@dataclass(frozen=True, kw_only=True)
class ReadingState:
    """The memories after a text; reading on from it does not change it."""

    fast: Parameters
    """W_t, each [*shape]."""
    rule_state: RuleState
    """What the rule carries."""
    model_state: Any
    """What the model carries; None if it has not read yet and begins with None."""
    last_token: int | None
    """The token that the next one follows; None at the start of a text without a start token."""
    num_tokens: int = 0
    """Tokens read since the start."""
    fallbacks: int = 0
    """How often the fast weights fell back to W_0 because the rule blew up."""


def save(
    state: ReadingState,
    path: Path | str,
    model: nn.Module,
    rule: AbstractUpdateRule | None,
    like: ReadingState,
) -> None:
    """Writes a state.

    Args:
        state: what is written.
        path: the file.
        model: the one that the state belongs to.
        rule: likewise.
        like: a fresh state, whose form `load` will take.

    Raises:
        ValueError: the model's or the rule's state holds something that no file can hold, or named
            tuples that loading could not restore.
    """
    if like.model_state is None and _has_names(state.model_state):
        raise ValueError(
            "the model's state has named tuples, which come back from a file as plain ones; "
            "expected an initial_state that shows their form, found none; give one to "
            "AdaptiveReader"
        )
    counts = {name: getattr(state, name) for name in ("last_token", "num_tokens", "fallbacks")}
    tensors, form = pack(
        {"fast": state.fast, "rule_state": state.rule_state, "model_state": state.model_state}
    )
    meta = {"kind": _KIND, "model": checksum(model), "rule": _name(rule), **counts, **form}
    checkpoint.save(Path(path), tensors, meta)


def load(
    path: Path | str, model: nn.Module, rule: AbstractUpdateRule | None, like: ReadingState
) -> ReadingState:
    """Reads a state that `save` wrote.

    Args:
        path: the file.
        model: must have the weights that the state began from.
        rule: must be of the kind that the state was read with; its numbers may be others.
        like: a fresh state; its form and devices are taken, named tuples included.

    Raises:
        ValueError: no such file, a damaged one, another kind of file, or a state of another model
            or kind of rule.
    """
    tensors, meta = checkpoint.load(Path(path))
    if meta.get("kind") != _KIND:
        raise ValueError(
            f"{path} is not the state of a reading; expected the kind {_KIND!r}, found "
            f"{meta.get('kind')!r}; pass a file that AdaptiveReader.save wrote"
        )
    tree = unpack(tensors, meta)
    found = {name: tuple(weight.shape) for name, weight in tree["fast"].items()}
    expected = {name: tuple(weight.shape) for name, weight in like.fast.items()}
    if found != expected:
        differing = min(name for name, _ in found.items() ^ expected.items())
        raise ValueError(
            f"{path} has other fast weights than this reader; expected {differing} of shape "
            f"{expected.get(differing, 'nothing')}, found {found.get(differing, 'nothing')}; use "
            "the model and the fast weights that it was saved with"
        )
    if meta["model"] != checksum(model):
        raise ValueError(
            f"{path} belongs to a model with other weights; expected the checksum "
            f"{checksum(model)[:16]}, found {meta['model'][:16]}; load the weights that it was "
            "saved with"
        )
    if meta.get("rule") != _name(rule):
        raise ValueError(
            f"{path} was read under another kind of rule; expected {_name(rule)}, found "
            f"{meta.get('rule')}; use the one that it was saved with"
        )
    device = next(model.parameters()).device
    tree = transform(tree, lambda tensor: tensor.to(device))
    return ReadingState(
        fast={name: tree["fast"][name] for name in like.fast},
        rule_state=formed(like.rule_state, tree["rule_state"]),
        model_state=formed(like.model_state, tree["model_state"]),
        last_token=meta["last_token"],
        num_tokens=meta["num_tokens"],
        fallbacks=meta["fallbacks"],
    )


def checksum(model: nn.Module) -> str:
    """SHA-256 over the name, type, shape and bytes of every parameter of a model."""
    total = hashlib.sha256()
    for name, weight in model.named_parameters():
        total.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        flat = weight.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _name(rule: AbstractUpdateRule | None) -> str:
    """The kind of a rule."""
    return "no rule" if rule is None else type(rule).__name__


def _has_names(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(_has_names(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return hasattr(tree, "_fields") or any(_has_names(value) for value in tree)
    return False
