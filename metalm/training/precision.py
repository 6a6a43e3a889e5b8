"""Matrix products in bfloat16, where the hardware has them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def reduced_products(device: torch.device | str, wanted: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if it is wanted and pays on this device; without effect otherwise.

    A processor or GPU without bfloat16 emulates it, many times slower than float32. So the same
    training may round differently on another machine.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and has_bfloat16(kind))


def has_bfloat16(kind: str) -> bool:
    """Whether products in bfloat16 are faster than in float32 on a kind of device."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch tells this in a private function, in versions from 2.6 on.
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return kind == "cpu" and bool(known())
