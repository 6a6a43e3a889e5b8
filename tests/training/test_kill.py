"""A real process, killed without warning again and again, ends bit for bit as one left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metalm.training import checkpoint
from metalm.training.record import read

NUM_STEPS = 31
ROOT = Path(__file__).resolve().parents[2]


def start(tiny, folder: Path, *hang_in: int) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tiny.TINY), str(folder), str(NUM_STEPS), *map(str, hang_in)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def last_step(folder: Path) -> int:
    return (checkpoint.saved_steps(folder) or [0])[-1]


def kill_at(tiny, folder: Path, step: int) -> None:
    """SIGKILL soon after so many steps are saved, in a step, in a save or between them."""
    with start(tiny, folder, step + 5) as process:
        deadline = time.monotonic() + 600
        while last_step(folder) < step and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.003)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "steps", [(8,), pytest.param((1, 8, 9, 17, 24), marks=pytest.mark.slow)], ids=len
)
def test_a_killed_run_ends_bit_for_bit_as_one_left_alone(tiny, steps, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    tiny.main(alone, NUM_STEPS)
    for step in steps:
        kill_at(tiny, killed, step)
        assert step <= last_step(killed) < NUM_STEPS
    with start(tiny, killed) as process:
        assert process.wait(600) == 0

    tensors, meta = checkpoint.load(checkpoint.latest(killed))
    expected, expected_meta = checkpoint.load(checkpoint.latest(alone))
    assert meta["step"] == NUM_STEPS
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert meta | {"seconds": 0.0} == expected_meta | {"seconds": 0.0}
    without_seconds = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder)]
        for folder in (killed, alone)
    ]
    assert without_seconds[0] == without_seconds[1]
    assert sorted(path.name for path in killed.glob("*checkpoint-*")) == [
        "checkpoint-000000030.safetensors",
        "checkpoint-000000031.safetensors",
    ]
