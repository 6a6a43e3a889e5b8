"""Whether kernels in Triton run here, and the modules that have them."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

_log = logging.getLogger(__name__)


@cache
def kernels_in(module: str) -> ModuleType | None:
    """A module of kernels in Triton; None where they do not run on the GPU that is there.

    Triton comes with torch's builds for CUDA on Linux, and needs a C compiler.

    Args:
        module: its full name.
    """
    return import_module(module) if _triton_works() else None


@cache
def _triton_works() -> bool:
    try:
        gpu_kernels = import_module("metalm.meta.kernels.gpu_kernels")
    except ImportError:
        return False
    try:
        one = torch.ones(1, device="cuda")
        gpu_kernels.write_step(one, one, one, one, one, None)
        return bool(one == 0)  # 1 - 1 * 1
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may say
        what = " ".join(str(error).splitlines()[:2])
        _log.warning(
            "Triton does not run here, so that torch's own operations take its place: the same "
            "results, more slowly (%s: %s)",
            type(error).__name__,
            what,
        )
        return False
