"""One thread for every test: tiny sizes gain nothing from more, and sums keep their order."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def _start_together(count, *command, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(count)
    ]


@pytest.fixture(scope="session")
def start_together():
    """Starts a program in several processes that find each other, as a launcher does."""
    return _start_together


@pytest.fixture(scope="session")
def run_together():
    """The same, to the end: (exit status, what was printed, what was said) of each."""

    def run(count, *command, **options):
        started = _start_together(count, *command, **options)
        ended = [process.communicate(timeout=600) for process in started]
        return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]

    return run
