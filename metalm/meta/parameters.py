"""Which parameters become fast, and how a module is called with other numbers than its own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]
"""A plain mapping from a parameter's name to its tensor."""


def choose(module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters that the patterns choose.

    A tensor that the module holds under several names is chosen when any of them matches, and is
    given under the first (in the order of ``module.named_parameters()``).

    Args:
        module: Any module.
        patterns: Shell patterns such as ``"embedding.*"`` or ``"*"``, matched with case.

    Returns:
        The names, in the module's own order, each tensor once.

    Raises:
        ValueError: A pattern matches no parameter, or there are no patterns.
    """
    tied = _tied_names(module)
    if not patterns:
        raise ValueError(
            "no parameter was chosen; expected at least one name pattern, found none; "
            f"do choose among {_listed(tied)}"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for names in tied for name in names):
            raise ValueError(
                f"no parameter matches {pattern!r}; expected a pattern of one of "
                f"{_listed(tied)}, found none; do correct the pattern"
            )
    return tuple(
        names[0]
        for names in tied
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
    )


def split(module: nn.Module, fast_names: Sequence[str]) -> tuple[Parameters, Parameters]:
    """The module's own parameters as (chosen, others), tied tensors once.

    Args:
        module: Any module.
        fast_names: Names as `choose` gives them.

    Returns:
        Two mappings that together hold every parameter of the module under its first name.

    Raises:
        ValueError: A name is not the first name of a parameter.
    """
    own: Parameters = dict(module.named_parameters())
    unknown = [name for name in fast_names if name not in own]
    if unknown:
        raise ValueError(
            f"unknown parameter {unknown[0]!r}; expected one of {', '.join(own)}, found "
            f"{unknown[0]!r}; do take the names from choose()"
        )
    chosen = set(fast_names)
    fast = {name: tensor for name, tensor in own.items() if name in chosen}
    rest = {name: tensor for name, tensor in own.items() if name not in chosen}
    return fast, rest


def call(module: nn.Module, parameters: Parameters, *args: Any, **kwargs: Any) -> Any:
    """``module(...)`` with these parameters in place of the module's own; tied names follow."""
    tied = {a: parameters[name] for a, name in aliases(module).items() if name in parameters}
    return call_with(module, {**parameters, **tied}, args, kwargs)


def call_with(
    module: nn.Module, numbers: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``module(...)`` with these numbers, each place of the module under one name."""
    # Torch would look for tied tensors at every call, and would put back twice what a submodule
    # under two names holds, the second time with the number that it was lent.
    return functional_call(module, numbers, args, kwargs, tie_weights=False)


def aliases(module: nn.Module) -> dict[str, str]:
    """Further places of tensors that a module holds in several, and the first name of each.

    A submodule under two names is one place, and has the first of them.
    """
    held: set[tuple[int, str]] = set()
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        own = chain(
            part.named_parameters(recurse=False, remove_duplicate=False),
            part.named_buffers(recurse=False, remove_duplicate=False),
        )
        for leaf, tensor in own:
            name = f"{prefix}.{leaf}" if prefix else leaf
            if (id(part), leaf) in held:
                continue
            held.add((id(part), leaf))
            if first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


def _tied_names(module: nn.Module) -> list[list[str]]:
    """The names of each parameter, tied ones together, in the module's order."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _listed(tied: list[list[str]]) -> str:
    return ", ".join(" = ".join(names) for names in tied)
