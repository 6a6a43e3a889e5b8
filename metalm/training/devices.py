"""The device of a run: asked for before anything is prepared, read or trained."""

from __future__ import annotations

import torch


def use_device(name: str) -> None:
    """Checks that tensors can be made there; of several CUDA devices this one does the work.

    Args:
        name: as torch has it, such as cpu, cuda or cuda:1.

    Raises:
        ValueError: torch does not know it, or this machine or this build of torch lacks it.
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"cannot use the device {name!r}; expected one that torch finds here, found "
            f"'{reason[0]}'; choose another --device, such as cpu"
        ) from error
    if device.type == "cuda" and ":" in name:  # kernels in Triton run on the current device
        torch.cuda.set_device(device)
