"""Trees of tensors and plain values, flattened for a checkpoint; and the states of randomness.

`pack` turns a tree such as {"model": module.state_dict(), "optimizer": optimizer.state_dict(),
"hidden": (h, c), "position": 7} into tensors and JSON; `unpack` is its inverse.
"""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metalm.training.processes import count

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"
_MARKS = frozenset({_TENSOR, _TUPLE, _ITEMS})


def pack(tree: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten a tree into named tensors and a JSON-ready description of its form.

    The leaves are tensors, bool, int, float, str and None; the nodes are mappings (keys: str,
    int, float, bool or None), lists and tuples. A NamedTuple comes back as a plain tuple. A tensor
    is named by its path, joined with dots.

    Returns:
        The tensors (detached, not copied) and the meta, {"tree": form}.

    Raises:
        ValueError: a leaf of another type; the message names its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {"tree": _flatten(tree, "", tensors)}


def unpack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Any:
    """Rebuild the tree that `pack` flattened; the tensors are used as they are, not copied.

    Raises:
        ValueError: meta is not the meta of `pack`, or a tensor that it names is missing.
    """
    if "tree" not in meta:
        raise ValueError(
            f"cannot rebuild the state; expected meta with the key 'tree', found {sorted(meta)}; "
            "pass what pack() returned"
        )
    return _rebuild(meta["tree"], tensors)


def _flatten(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = path or "value"
        while name in tensors:
            name += "_"
        tensors[name] = node.detach()
        return {_TENSOR: name}
    if node is None or type(node) in (bool, int, float, str):
        return node
    prefix = path + "." if path else ""
    if isinstance(node, Mapping):
        if all(type(key) is str for key in node) and not _MARKS & set(node):
            return {key: _flatten(value, prefix + key, tensors) for key, value in node.items()}
        for key in node:
            if not (key is None or type(key) in (bool, int, float, str)):
                raise ValueError(
                    f"cannot save the state: the key {key!r} at {path or 'the root'!r} is a "
                    f"{type(key).__name__}; expected str or a number; convert it"
                )
        items = [[key, _flatten(node[key], f"{prefix}{key}", tensors)] for key in node]
        return {_ITEMS: items}
    if isinstance(node, (list, tuple)):
        parts = [_flatten(value, f"{prefix}{i}", tensors) for i, value in enumerate(node)]
        return parts if isinstance(node, list) else {_TUPLE: parts}
    raise ValueError(
        f"cannot save the state: {path or 'the root'!r} is a {type(node).__module__}."
        f"{type(node).__name__}; expected tensors, plain numbers, text, None and containers of "
        "them; convert it (numbers with .item(), arrays with torch.from_numpy)"
    )


def _rebuild(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(form, list):
        return [_rebuild(part, tensors) for part in form]
    if not isinstance(form, dict):
        return form
    if _TENSOR in form:
        if form[_TENSOR] not in tensors:
            raise ValueError(
                f"cannot rebuild the state; expected a tensor named {form[_TENSOR]!r}, found "
                f"{len(tensors)} others; use the tensors of the same checkpoint"
            )
        return tensors[form[_TENSOR]]
    if _TUPLE in form:
        return tuple(_rebuild(part, tensors) for part in form[_TUPLE])
    if _ITEMS in form:
        return {key: _rebuild(part, tensors) for key, part in form[_ITEMS]}
    return {key: _rebuild(part, tensors) for key, part in form.items()}


def random_states() -> dict[str, Any]:
    """The states of the global generators of torch (CPU, CUDA), Python and NumPy, as a tree.

    NumPy is only asked if something has imported it. A generator of your own belongs in your
    own state: `generator.get_state()` for torch, `generator.bit_generator.state` for NumPy.
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators back into the states that `random_states` found."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        if count() == 1 and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
        else:  # each of several processes draws on its own device what the first, on device 0, does
            torch.cuda.set_rng_state(states["cuda"][0])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        numpy.random.set_state(states["numpy"])


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """What runs inside draws numbers as it likes; the global generators end as they began."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
