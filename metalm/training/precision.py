"""How matrix products are taken: in bfloat16 where the hardware has it, or in quick float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Shapes [rows, inner] x [inner, columns] of the kinds that occur: a segment's tokens against a
# weight, one way and the other, and a gradient of a weight.
_PROBED = ((5, 256, 600), (20, 256, 600), (10, 600, 256), (600, 10, 256))

# Largest relative error of a product that still counts as float32: a few times its rounding.
_EXACT = 2e-6


def reduced_products(device: torch.device | str, wanted: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if it is wanted and pays on this device; without effect otherwise.

    A processor or GPU without bfloat16 emulates it, many times slower than float32. So the same
    training may round differently on another machine. Where that is not wanted, there is
    `refuse_emulated_bfloat16`.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and has_bfloat16(kind))


def refuse_emulated_bfloat16(device: torch.device | str) -> None:
    """Checks that products in bfloat16 are what is wanted where they decide what a number is.

    A training that rounds otherwise on another machine is still that training; a perplexity that
    is said to be of bfloat16 should be.

    Raises:
        ValueError: `reduced_products` would take them in float32 there.
    """
    kind = torch.device(device).type
    if not has_bfloat16(kind):
        raise ValueError(
            f"reading in bfloat16 does not pay on this {kind}; expected a processor or GPU with "
            "matrix products in bfloat16, found one that would emulate them; leave out "
            "--evaluation.bfloat16 (evaluate.py: --no-bfloat16), or use another machine"
        )


def has_bfloat16(kind: str) -> bool:
    """Whether products in bfloat16 are faster than in float32 on a kind of device."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch tells this in a private function, in versions from 2.6 on.
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return kind == "cpu" and bool(known())


@contextmanager
def unrounded_float32() -> Iterator[None]:
    """Where cuDNN's products in float32 are that; by itself it rounds their factors to 10 bits.

    The gradients of what is read there too. Torch's other products are exact unless told otherwise.
    """
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        yield


@contextmanager
def quickest_float32(left: Tensor) -> Iterator[None]:
    """Float32 products of several rows on a CPU go through oneDNN inside, if it is as exact.

    With the 5 to 20 tokens of a segment on one side it takes 0.5 to 0.75 of the time (measured,
    EXPERIMENTS.md). Torch hands float32 products to oneDNN only together with the leave to round
    them, which oneDNN takes where the processor has matrix units for it; so that is tried first.

    Args:
        left: left factor of the products, [rows, ...]; nothing changes for a single row, another
            type or another device.
    """
    on_cpu = left.device.type == "cpu" and left.dtype == torch.float32
    if not on_cpu or left.shape[0] == 1 or not _onednn_is_exact():
        yield
        return
    with _leave_to_round():
        yield


@cache
def _onednn_is_exact() -> bool:
    """Whether this torch can ask oneDNN for float32 products, and they come out exact."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in _PROBED:
        left = torch.randn(2, rows, inner, generator=generator)
        right = torch.randn(2, columns, inner, generator=generator).mT
        exact = left.double() @ right.double()
        with _leave_to_round():
            found = torch.stack((left @ right, left @ right.contiguous())).double()
        if not bool((found - exact).norm() < _EXACT * found.norm()):
            return False
    return True


@contextmanager
def _leave_to_round() -> Iterator[None]:
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
