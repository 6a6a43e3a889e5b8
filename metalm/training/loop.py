"""The loop: steps, evaluation, saving; a run killed at any moment continues bit for bit (CPU).

At each turn, with `step` steps finished: evaluate if due, save if due, stop if all are done, else
take the next step. What is saved is the trainable's own state, the states of the global random
generators, and how far the record had come. The clock decides only when to save, never a result.
Bit for bit holds for the same machine, library versions and number of threads.

Several processes (`processes.py`) take every turn together; process 0 writes. What is saved does
not say how many there were: any number goes on from it, but for rounding.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from metalm.training import checkpoint
from metalm.training.processes import first_alone, highest
from metalm.training.record import Progress, Record, refuse_non_finite
from metalm.training.state import (
    pack,
    preserved_random_states,
    random_states,
    restore_random_states,
    unpack,
)
from metalm.training.stop import Stop

_TRAINED_FOR_SAVED = 10
"""Seconds of training, at least, to a second of saving: a state may have many gigabytes."""


class Trainable(Protocol):
    """Anything that takes steps and can say and take back all that the next step depends on."""

    def step(self, index: int) -> Mapping[str, float]:
        """Take step number `index` (from 0); return named numbers, "tokens" among them if known.

        Everything that outlives the step (weights, optimiser, hidden states, fast weights of
        unfinished rows, position in the data) must be in the state, or follow from the index.
        """
        ...

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The whole state as tensors and JSON; `metalm.training.state.pack` makes it of a tree.

        Of several processes all are asked, and what process 0 gives is the whole.
        """
        ...

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take the whole state back; the tensors are the receiver's to keep."""
        ...


def run(
    trainable: Trainable,
    *,
    num_steps: int,
    folder: Path,
    record: Record | None = None,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    save_every_seconds: float = 60.0,
    save_every_steps: int = 0,
    log_every: int = 1,
    configuration: Mapping[str, Any] | None = None,
    title: str = "training",
) -> None:
    """Train from the newest checkpoint in the folder, or from the start, to the last step.

    Args:
        trainable: what is trained; its state after the last step is the result.
        num_steps: steps in all, those of earlier runs included.
        folder: where the checkpoints lie (the two newest are kept).
        record: measurements; kinds "train" and "evaluation". None: nothing is written, as in all
            processes but the first.
        evaluate: takes the number of finished steps; draws random numbers as it likes, without
            effect on the training. A run killed after it may evaluate again.
        evaluate_every: steps between evaluations, from step 0 on, and after the last; 0: never.
        save_every_seconds: save at the first end of a step after so many seconds, or after ten
            times as long as the last save took, if that is longer.
        save_every_steps: save after each multiple of so many steps; 0: by the clock only.
        log_every: steps that one "train" line averages over; the last line, over those that remain.
        configuration: JSON value that a checkpoint must share to be continued.
        title: name of the progress bar.

    Raises:
        ValueError: a number is not finite (the last checkpoint is kept), or the checkpoint was
            made with another configuration, or is damaged.
        metalm.training.stop.Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    turn = _Turn(folder, record, log_every, dict(configuration or {}))
    turn.resume(trainable, num_steps)
    last_save, pause = time.monotonic(), save_every_seconds
    with Stop() as stop, Progress(title, num_steps, initial=turn.step) as progress:
        while True:
            last = turn.step >= num_steps
            evaluation_due = (
                evaluate is not None
                and evaluate_every > 0
                and (last or turn.step % evaluate_every == 0)
                and turn.evaluated != turn.step
            )
            steps_due = save_every_steps > 0 and turn.step % save_every_steps == 0
            time_due = time.monotonic() - last_save >= pause
            # All processes have to see it the same way, whenever the signal came to each.
            came, due = map(int, highest(stop.signal, time_due))
            # Saved before an evaluation: it may take long, and can then be stopped anywhere.
            if last or evaluation_due or steps_due or due or came:
                began = time.monotonic()
                turn.save(trainable)
                last_save = time.monotonic()
                pause = max(save_every_seconds, _TRAINED_FOR_SAVED * (last_save - began))
                (came,) = map(int, highest(stop.signal))
            if came:
                stop.signal = came
                progress.close()
                stop.leave(f"{title}: stopped after {turn.step} steps")
            if evaluate is not None and evaluation_due:
                with stop.at_once(f"{title}: stopped in the evaluation after {turn.step} steps"):
                    turn.evaluate(evaluate)
                continue
            if last:
                turn.end()
                return
            values = turn.take(trainable)
            shown = {name: value for name, value in values.items() if name == "loss"}
            progress.update(tokens=values.get("tokens", 0.0), values=shown)


class _Turn:
    """Where the loop stands: all that it adds to the trainable's state in a checkpoint."""

    def __init__(
        self, folder: Path, record: Record | None, log_every: int, configuration: dict[str, Any]
    ) -> None:
        self.folder, self.record, self.log_every = Path(folder), record, log_every
        self.configuration = _flat(configuration)
        self.step = 0
        self.evaluated = -1
        self.seconds = 0.0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}  # a step may leave a value out
        self.count = 0
        self.is_new = True

    def resume(self, trainable: Trainable, num_steps: int) -> None:
        """Continue from the newest checkpoint, if there is one; cut the record to match."""
        path = first_alone(lambda: checkpoint.latest(self.folder))
        if path is None:
            if self.record is not None:
                self.record.rewind(0, -1)
            return
        tensors, meta = checkpoint.load(path)
        _refuse_other(path, meta["configuration"], self.configuration)
        if meta["step"] > num_steps:
            raise ValueError(
                f"the checkpoint {path} is beyond the end; expected at most {num_steps} steps, "
                f"found {meta['step']}; ask for more steps or use another folder"
            )
        self.step, self.evaluated = meta["step"], meta["evaluated"]
        self.seconds, self.sums, self.count = meta["seconds"], meta["sums"], meta["count"]
        self.counts = meta["counts"]
        trainable.load_state_dict(_under("state.", tensors), meta["state"])
        if self.record is not None:
            self.record.rewind(meta["record_lines"], self.step)
        restore_random_states(unpack(_under("random.", tensors), meta["random"]))
        self.is_new = False

    def evaluate(self, evaluate: Callable[[int], Mapping[str, float]]) -> None:
        """Measure, with the global random states put back after it."""
        with preserved_random_states():
            values = {name: float(value) for name, value in evaluate(self.step).items()}
        where = f"the evaluation after {self.step} steps"
        refuse_non_finite(values, where, self._advice())
        if self.record is not None:
            self.record.write("evaluation", self.step, values, self.seconds)
        self.evaluated = self.step
        self.is_new = True

    def take(self, trainable: Trainable) -> dict[str, float]:
        """One step of training, measured and refused if it is not finite."""
        start = time.monotonic()
        values = {name: float(value) for name, value in trainable.step(self.step).items()}
        self.seconds += time.monotonic() - start
        refuse_non_finite(values, f"step {self.step}", self._advice())
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.step += 1
        self.count += 1
        self.is_new = True
        if self.count >= self.log_every:
            self._write_means()
            self.sums, self.counts, self.count = {}, {}, 0
        return values

    def end(self) -> None:
        """Record the steps left over at the end.

        Not part of the checkpoint: a run that goes on with more steps cuts this line, and finds the
        sums as they were.
        """
        if self.count > 0:
            self._write_means()
            if self.record is not None:
                self.record.flush()

    def _write_means(self) -> None:
        if self.record is not None:
            means = {name: total / self.counts[name] for name, total in self.sums.items()}
            self.record.write("train", self.step, means, self.seconds)

    def save(self, trainable: Trainable) -> None:
        """Write the checkpoint if anything is new; NaN never replaces good numbers."""
        if not self.is_new:
            return
        tensors, meta = trainable.state_dict()
        first_alone(lambda: self._write_checkpoint(tensors, meta))
        self.is_new = False

    def _write_checkpoint(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ValueError(
                    f"the state after {self.step} steps has NaN in {name!r}; expected numbers, "
                    f"found NaN; {self._advice()}"
                )
        random_tensors, random_meta = pack(random_states())
        if self.record is not None:
            self.record.flush()
        checkpoint.save_step(
            self.folder,
            self.step,
            {f"state.{name}": tensor for name, tensor in tensors.items()}
            | {f"random.{name}": tensor for name, tensor in random_tensors.items()},
            {
                "step": self.step,
                "evaluated": self.evaluated,
                "seconds": self.seconds,
                "sums": self.sums,
                "counts": self.counts,
                "count": self.count,
                "record_lines": self.record.num_lines if self.record is not None else 0,
                "configuration": self.configuration,
                "random": random_meta,
                "state": meta,
            },
        )

    def _advice(self) -> str:
        kept = checkpoint.latest(self.folder)
        there = f"the last checkpoint, {kept}, is kept" if kept else "no checkpoint was written yet"
        return f"{there}; lower the learning rate or clip the gradient"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def _flat(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names, with what JSON makes of the values."""
    flat: dict[str, Any] = {}
    for key, value in configuration.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _refuse_other(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name in sorted(saved.keys() | asked.keys()):
        before, now = saved.get(name, "nothing"), asked.get(name, "nothing")
        if before != now:
            raise ValueError(
                f"the checkpoint {path} was made with another configuration; expected {name} = "
                f"{now}, found {before}; repeat the old configuration or use another folder"
            )
