"""Low-rank fast weights: W = W_0 + U V, where only U and V are fast.

Any module becomes one whose chosen tensors are sums of this kind. U and V are parameters of their
own, which `choose` finds and rules rewrite like any others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metalm.meta.parameters import call, choose

Basis = Literal["random", "principal"]


class LowRank(nn.Module):
    """A module called with W_0 + U V in place of each of its chosen tensors.

    U is ``[m, rank]`` and starts at zero, so that the module starts as it was; V is ``[rank, n]``.
    m is the tensor's first dimension, n the product of the others. Its parameters are the module's,
    as ``module.NAME``, and for each chosen tensor ``factors.NAME.left`` (U) and ``.right`` (V),
    with ``/`` for the dots of the name. Any of them may have a dimension of rows if the module's
    parameters may: each row's weight is then built of its own factors.

    **Memory.** A row of fast weights holds rank (m + n) numbers for a tensor (`state_size`) instead
    of m n. The sum itself, and its gradient, are there while a segment is scored and learnt from:
    two tensors ``[rows, m, n]`` that nothing keeps.

    Whatever the module has beside its parameters is found here under the same name.

    Args:
        module: Any module; its parameters stay its own.
        patterns: Of the names of tensors that get factors, as `choose` takes them.
        rank: Of U V, at least 1 and at most the smaller side of each chosen tensor.
        basis: Where V starts: orthonormal rows drawn at random, or the principal directions of the
            rows of W_0.
        seed: Of what is drawn.

    Raises:
        ValueError: A pattern without a match, a tensor of fewer than two dimensions, or a rank that
            does not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        patterns: Sequence[str],
        rank: int,
        basis: Basis = "random",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if basis not in ("random", "principal"):
            raise ValueError(
                f"unknown basis; expected 'random' or 'principal', found {basis!r}; do change it"
            )
        self.module = module
        self.low_rank_names = choose(module, patterns)
        own = dict(module.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        self.factors = nn.ModuleDict()
        for name in self.low_rank_names:
            _check(name, own[name], rank)
            self.factors[_key(name)] = _Factors(own[name], rank, basis, generator)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # before it was set
                raise
            return getattr(self.module, name)

    def state_size(self) -> int:
        """How many numbers all U and V hold for a row of fast weights."""
        return sum(factor.numel() for factor in self.factors.parameters())

    def weight(self, name: str) -> Tensor:
        """W_0 + U V of a chosen tensor, ``[*shape]`` or ``[rows, *shape]``."""
        slow: Tensor = attrgetter(name)(self.module)
        change: Tensor = self.factors[_key(name)]()
        return slow + change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own result, with the sums in place of its chosen tensors."""
        weights = {name: self.weight(name) for name in self.low_rank_names}
        return call(self.module, weights, *args, **kwargs)


class _Factors(nn.Module):
    """U and V of one tensor."""

    def __init__(self, weight: Tensor, rank: int, basis: Basis, generator: torch.Generator) -> None:
        super().__init__()
        flat = weight.detach().flatten(1)
        rows = flat.double().cpu()
        if basis == "random":
            rows = torch.randn(rank, flat.shape[1], generator=generator, dtype=torch.float64)
        # Right singular vectors: any orthonormal basis of what was drawn, or the principal ones.
        right = torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
        self.left = nn.Parameter(flat.new_zeros(len(flat), rank))
        self.right = nn.Parameter(right.to(flat))
        self.shape = weight.shape

    def forward(self) -> Tensor:
        """U V in the shape of the tensor, with the rows of either."""
        product: Tensor = self.left @ self.right
        return product.unflatten(-1, self.shape[1:])


def _key(name: str) -> str:
    """A parameter's name as a module can register it, which takes no dots."""
    return name.replace(".", "/")


def _check(name: str, weight: Tensor, rank: int) -> None:
    if weight.dim() < 2:
        raise ValueError(
            f"{name!r} has no rank; expected tensors of two dimensions or more, found the shape "
            f"{tuple(weight.shape)}; do leave it out (it can be fast as it is)"
        )
    most = min(len(weight), math.prod(weight.shape[1:]))
    if not 1 <= rank <= most:
        raise ValueError(
            f"impossible rank for {name!r}; expected 1 to {most}, found {rank}; do change it, or "
            "leave the tensor out"
        )
