"""Peak memory of this process, measured over a stretch of work (Linux, or a CUDA device)."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# From the kernel's proc(5): writing 5 resets the peak resident set size.
_RESET_PEAK = "5"


def reset_peak_memory() -> None:
    """Gives free memory back and starts a new measurement; does nothing where the system cannot."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return


def peak_memory() -> int | None:
    """Most memory since `reset_peak_memory`, in bytes; None where the system does not tell.

    On a CUDA device, what torch allocated there; else the resident memory of the whole process.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None
