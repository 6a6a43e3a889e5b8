"""Any module with its batch normalisation, ReLU and maxima as one operation where they follow.

In front of a network the convolution of its pictures joins them.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from torch import nn

from metalm.meta.layers.first_layer import first_layer, is_first
from metalm.meta.layers.norm_relu_pool import NormReluPool


def fused(module: nn.Module) -> nn.Module:
    """The same module in fewer passes over memory: see `NormReluPool`.

    Wherever an ``nn.Sequential`` holds a batch normalisation of maps, a ReLU and maybe maxima over
    2 x 2, in this order, they run as one; and with them a convolution in front of them, where it
    takes few channels that no gradient is asked for (`first_layer.py`). Parameters, buffers and
    their names are the module's own, so that a checkpoint of one fits the other and an optimiser of
    one trains both; what is computed is the same up to rounding. Parts with hooks, of other
    settings or of classes of their own stay as they are, and so does the module that was given.
    Modes (training or evaluation) are taken over now and belong to each afterwards.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        >>> [type(part).__name__ for part in fused(net)]
        ['Conv2d', 'NormReluPool', 'Identity', 'Identity']
    """
    return _copy(module, {})


class FusedSequential(nn.Sequential):
    """A sequence in which a convolution of pictures runs with what follows it."""

    def forward(self, input: Any) -> Any:
        """What ``nn.Sequential`` gives."""
        parts = [*self, None]
        joined = False
        for part, following in pairwise(parts):
            if joined:
                joined = False
            elif is_first(part, following) and not (_listened(part) or _listened(following)):
                input, joined = first_layer(input, part, following), True
            else:
                input = part(input)
        return input


def _copy(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """The module, or a copy that shares its tensors if something below it is fused."""
    if id(module) in known:
        return known[id(module)]
    parts = {
        name: part if part is None else _copy(part, known) for name, part in module._modules.items()
    }
    if type(module).forward is nn.Sequential.forward:
        parts = _joined(parts)
    found = module
    if any(part is not module._modules[name] for name, part in parts.items()):
        found = copy.copy(module)
        found._modules = parts
        if type(module) is nn.Sequential and any(
            map(is_first, parts.values(), [*parts.values()][1:])
        ):
            found.__class__ = FusedSequential
    known[id(module)] = found
    return found


def _joined(parts: dict[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    """The parts of a sequence, those that are part of one operation now without effect."""
    names, found = list(parts), dict(parts)
    for first, name in enumerate(names):
        norm, relu, pool = ([parts[n] for n in names[first : first + 3]] + [None, None])[:3]
        if not (_is_plain(norm, nn.BatchNorm2d) and _is_plain(relu, nn.ReLU)):
            continue
        halves = isinstance(pool, nn.MaxPool2d) and _is_plain(pool, nn.MaxPool2d) and _halves(pool)
        assert isinstance(norm, nn.BatchNorm2d)
        found[name] = NormReluPool.of(norm, 2 if halves else 1)
        for other in names[first + 1 : first + (3 if halves else 2)]:
            found[other] = nn.Identity()
    return found


def _halves(pool: nn.MaxPool2d) -> bool:
    both = (2, (2, 2))
    return (
        pool.kernel_size in both
        and pool.stride in both
        and pool.padding in (0, (0, 0))
        and pool.dilation in (1, (1, 1))
        and not (pool.ceil_mode or pool.return_indices)
    )


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, and nobody listens to it."""
    return type(module) is kind and not _listened(module)


def _listened(module: nn.Module | None) -> bool:
    listeners = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in listeners)
