"""What several processes do together: a program that a test starts in each of them.

several.py meet | refuse | "fail in 1" | run FOLDER [STEP PROCESS]
"""

import importlib.util
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from metalm.training import checkpoint, loop, processes
from metalm.training.record import Record

SEVERAL = Path(__file__)
NUM_STEPS = 19


def tiny():
    path = SEVERAL.with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("tiny_trainables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def meet() -> None:
    """Every way to meet, once; prints what this process has then."""
    own = processes.rank()
    sizes = (2, 0, 3)
    doubles = torch.full((2, 3), own + 0.5, dtype=torch.float64).t()  # not contiguous
    floats = torch.tensor([1.0, 10.0 * own])
    processes.add_up([doubles, floats])
    same = torch.tensor([float(own), 7.0])
    processes.as_first([same])
    held = torch.arange(sizes[own] * 2).view(-1, 2) + 100 * own
    whole = processes.stacked(held, sizes)
    nested = processes.first_alone(
        lambda: [processes.count(), processes.rank(), processes.first_alone(lambda: own)]
    )
    try:
        processes.first_alone(refused)
    except ValueError as error:
        told = [type(error).__name__, str(error)]
    found = {
        "count": processes.count(),
        "rank": own,
        "add_up": [doubles.tolist(), floats.tolist()],
        "as_first": same.tolist(),
        "stacked": whole.tolist(),
        "sums": processes.sums(0.5 + own, 2),
        "highest": processes.highest(own, -own),
        "of_each": processes.of_each({"mine": own}),
        "first_alone": nested,
        "told": told,
    }
    print(json.dumps(found))


def refused() -> None:
    """Stands for a disk that is full."""
    raise ValueError(f"no room for process {processes.rank()}")


class Waiting:
    """A tiny training that in one step, in one process, says so and waits for a sign."""

    def __init__(self, folder: Path, step: int, process: int) -> None:
        # Another start with every process that goes on: all has to be restored.
        resumes = checkpoint.latest(folder) is not None
        self.inner = tiny().Base(seed=1 + processes.rank() if resumes else 0)
        self.folder = folder
        self.wait_in = step if process == processes.rank() else -1
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    def step(self, index: int) -> dict[str, float]:
        if index == self.wait_in:
            (self.folder / "waiting").touch()
        while index == self.wait_in and not (self.folder / "go").exists():
            time.sleep(0.01)
        return self.inner.step(index)


def run(folder: Path, wait_in: int = -1, process: int = 0) -> None:
    """The loop around a training that is the same in every process."""
    with Record(folder, tensorboard=False) if processes.is_first() else nullcontext() as record:
        loop.run(
            Waiting(folder, wait_in, process),
            num_steps=NUM_STEPS,
            folder=folder,
            record=record,
            save_every_steps=4,
            save_every_seconds=1e9,
            evaluate=lambda step: {"noise": torch.rand(()).item() + step},
            evaluate_every=5,
        )


def main(what: str, folder: str = "", *numbers: str) -> None:
    torch.set_num_threads(1)
    with processes.together():
        if what == "meet":
            meet()
        elif what == "refuse":
            processes.first_alone(refused)
        elif what == "fail in 1" and processes.rank() == 1:
            refused()
        elif what == "run":
            run(Path(folder), *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
