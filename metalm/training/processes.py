"""Several processes of one program, which share the rows of every batch.

    torchrun --nproc-per-node 2 -- train.py ...
    accelerate launch --multi_gpu --num_processes 2 train.py ...

(Without the --, torchrun takes --run for an option of its own; without GPUs, too, it is --multi_gpu
that makes accelerate start several processes.) Both start the program so many times and say in the
environment how the processes find each other (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). All of
them do the same, on different rows; they meet in the functions of this file, each of which EVERY
process has to call. Process 0 alone writes. A program that was started by itself does not touch
torch.distributed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# How long the others may keep a process waiting before it counts them as lost: in a step, which
# all take at the same time, and where one of them has work of its own (a text to read, a report).
# One that has died is found out at once, by its closed connection.
_IN_A_STEP = timedelta(minutes=30)
_FOR_ONE = timedelta(days=2)


class LostProcessError(ValueError):
    """Another process of this run has ended, or does not answer."""


class ToldError(ValueError):
    """What process 0 has been refused; it says so itself."""


class _Group(NamedTuple):
    rank: int
    size: int
    patient: Any
    """Group of the same processes that waits for `_FOR_ONE`."""


_ALONE = _Group(0, 1, None)
_group = _ALONE


def count() -> int:
    """How many processes run this program together; 1 for one by itself."""
    return _group.size


def rank() -> int:
    """The number of this process, from 0."""
    return _group.rank


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return _group.rank == 0


@contextmanager
def together() -> Iterator[None]:
    """Joins the other processes for as long as the block runs; does nothing for one by itself.

    A ValueError that leaves the block ends a program of several processes with status 2 and a
    message; SIGTERM, which a launcher sends to those that are left when one has died, with a
    message too.

    Raises:
        ValueError: the environment says that there are others, not where; or the launcher was
            asked for what the configuration says.
    """
    _refuse_launchers_settings()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    with _joined(), _ended_by_signal():
        try:
            yield
            _meet()  # so that nobody leaves while another still hears from it
        except ValueError as error:
            if not isinstance(error, ToldError):
                who = "error" if is_first() else f"error in process {rank()}"
                print(f"{who}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error


def _refuse_launchers_settings() -> None:
    """What `accelerate launch` was asked for and would be left undone without a word."""
    asked = {
        "ACCELERATE_MIXED_PRECISION": ("no", "", "--base.bfloat16, --rule.bfloat16 and the like"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "", "--accumulation"),
    }
    for name, (*usual, instead) in asked.items():
        found = os.environ.get(name, "")
        if found not in usual:
            raise ValueError(
                f"the launcher's settings are not those of a run; expected {name} to be unset or "
                f"{usual[0]}, found {found!r}; leave it out and use {instead}"
            )


def refuse_several(what: str) -> None:
    """Checks that the program runs by itself.

    Raises:
        ValueError: it does not.
    """
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found > 1:
        raise ValueError(
            f"{what} runs in one process; expected one, found {found}; start it without torchrun"
        )


def first_alone(work: Callable[[], Result]) -> Result:
    """Has process 0 alone do something, when all have come so far; the others wait.

    What is inside runs as if there were one process. Since all wait before it, none of them can
    still look for a file that is not there yet because it is written here.

    Returns:
        What the work gave, in every process.

    Raises:
        ValueError: what the work raises, in every process.
    """
    if count() == 1:
        return work()
    _meet()
    done: list[Any] = [None, None]
    if is_first():
        try:
            done = [_by_itself(work), None]
        except ValueError as error:
            done = [None, str(error)]
            _broadcast(done)
            raise
    _broadcast(done)
    if done[1] is not None:
        raise ToldError(done[1])
    result: Result = done[0]
    return result


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes, in place; the same bits in all of them.

    Args:
        tensors: of the same shapes and types in every process.
    """
    if count() == 1:
        return
    kinds: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for several in kinds.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in several])
        with _reached():
            torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in several])
        with torch.no_grad():
            for tensor, part in zip(several, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def sums(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    if count() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    add_up([total])
    found: list[float] = total.tolist()
    return found


def highest(*numbers: float) -> list[float]:
    """Each number as it is highest among the processes."""
    if count() == 1:
        return list(numbers)
    most = torch.tensor(numbers, dtype=torch.float64)
    with _reached():
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    found: list[float] = most.tolist()
    return found


def as_first(tensors: Sequence[Tensor]) -> None:
    """Gives every process the numbers of process 0, in place."""
    if count() == 1:
        return
    with _reached(), torch.no_grad():
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), 0)


def of_each(value: Result) -> list[Result]:
    """What every process hands over, in their order; each may take its time."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _reached():
        torch.distributed.all_gather_object(found, value, group=_group.patient)
    return found


def stacked(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """Parts of a tensor that the processes hold, laid one behind the other in process 0.

    Args:
        part: what this process holds, [size, ...].
        sizes: first dimension of each process's part.

    Returns:
        The whole [sum of sizes, ...] on the CPU in process 0; something else in the others.
    """
    if count() == 1:
        return part
    part = part.detach().cpu().contiguous()
    with _reached():
        if not is_first():
            if part.numel() > 0:
                torch.distributed.send(part, 0)
            return part
        whole = part.new_empty(sum(sizes), *part.shape[1:])
        for source, piece in enumerate(whole.split(list(sizes))):
            if source == 0:
                piece.copy_(part)
            elif piece.numel() > 0:
                torch.distributed.recv(piece, source)
    return whole


@contextmanager
def _joined() -> Iterator[None]:
    """The group, from the environment."""
    global _group
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ValueError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, but not where the other "
            f"processes are; expected {missing[0]} too, found nothing; start the program with "
            "torchrun, or unset WORLD_SIZE"
        )
    import torch.distributed as distributed  # here: not every build of torch has it

    own, here = (int(os.environ.get(n, "0")) for n in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    devices = torch.cuda.device_count()
    if devices > 0:
        torch.cuda.set_device(own % devices)
    # Without a GPU for each process, gloo takes the tensors of all kinds.
    backend = "cpu:gloo,cuda:nccl" if devices >= max(1, here) else "gloo"
    with _reached():
        distributed.init_process_group(backend, timeout=_IN_A_STEP)
        patient = distributed.new_group(backend="gloo", timeout=_FOR_ONE)
    _group = _Group(distributed.get_rank(), distributed.get_world_size(), patient)
    try:
        yield
    finally:
        _group = _ALONE
        # After an error too: threads of the group that still run when Python ends abort it.
        distributed.destroy_process_group()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM is said before it ends the process, unless something inside takes it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        print(
            f"process {os.environ['RANK']}: ended by SIGTERM, as when another process of the run "
            "has died; what is saved is kept, the same command continues",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _reached() -> Iterator[None]:
    """Says that a process is lost where torch says that it cannot reach it."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostProcessError(
            "another process of this run has ended or does not answer; expected all "
            f"{os.environ['WORLD_SIZE']} of them to go on, found '{reason}'; what is saved, the "
            "last checkpoint too, is kept: see what ended it, then repeat the command, with any "
            "number of processes"
        ) from error


def _meet() -> None:
    """Waits until every process is here."""
    with _reached():
        torch.distributed.all_reduce(torch.zeros(1), group=_group.patient)


def _broadcast(values: list[Any]) -> None:
    """Puts the values of process 0 into the list of every process."""
    with _reached():
        torch.distributed.broadcast_object_list(values, 0, group=_group.patient)


def _by_itself(work: Callable[[], Result]) -> Result:
    global _group
    group, _group = _group, _ALONE
    try:
        return work()
    finally:
        _group = group
