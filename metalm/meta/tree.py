"""Trees of tensors: tuples, named tuples, lists and mappings with tensors at their leaves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def transform(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor replaced by function(tensor), in a fixed order.

    Mappings become plain dicts unless they hold no tensor; whatever is not a tensor is kept.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(transform(value, function) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(transform(value, function) for value in tree)
    if isinstance(tree, Mapping) and any(True for _ in tensors(tree)):
        return {name: transform(value, function) for name, value in tree.items()}
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """The tree's tensors, in the order of `transform`."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, list | tuple):
        return [tensor for value in tree for tensor in tensors(value)]
    return []


def form(tree: Any) -> Hashable:
    """Everything about a tree but the numbers in its tensors.

    Trees of the same form can be laid together. Objects that cannot be compared make forms that
    differ.
    """
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, Mapping):
        return dict, tuple((name, form(value)) for name, value in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree), tuple(form(value) for value in tree)
    return tree if isinstance(tree, Hashable) else id(tree)


def detach(tree: Any) -> Any:
    """The same tree, its tensors without history."""
    return transform(tree, Tensor.detach)


def join(trees: Sequence[Any]) -> Any:
    """One tree of trees of the same form, each tensor laid behind its fellows [rows, ...]."""
    if len(trees) == 1:
        return trees[0]
    columns = zip(*(tensors(tree) for tree in trees), strict=True)
    return replace(trees[0], [torch.cat(column) for column in columns])


def write(tree: Any, new: Any) -> None:
    """Writes the numbers of a tree into the tensors of another of the same form."""
    for tensor, numbers in zip(tensors(tree), tensors(new), strict=True):
        tensor.copy_(numbers)


def replace(tree: Any, new: list[Tensor]) -> Any:
    """The same tree with these tensors, in the order of `tensors`."""
    remaining = iter(new)
    return transform(tree, lambda _: next(remaining))


def formed(like: Any, tree: Any) -> Any:
    """The tree with the named tuples of another, which a file holds as plain ones."""
    if isinstance(like, Tensor) or isinstance(tree, Tensor):
        return tree
    if isinstance(like, Mapping) and isinstance(tree, Mapping):
        return {name: formed(like.get(name), value) for name, value in tree.items()}
    if isinstance(like, list | tuple) and isinstance(tree, list | tuple):
        if len(like) != len(tree):
            return tree
        parts = [formed(own, value) for own, value in zip(like, tree, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)
    return tree
