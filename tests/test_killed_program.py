"""train.py itself, killed again and again without warning, ends as one left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metalm.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
KILLS = 12
SMALL = (
    "--preset=tiny",
    "--threads=1",
    "--data.vocabulary-size=300",
    "--model.embedding-size=4",
    "--model.hidden-size=6",
    "--base.tokens=4000",
    "--base.rows=2",
    "--base.window=10",
    "--rule.tokens=400",
    "--rule.segment=5",
    "--joint.tokens=2000",
    "--joint.segment=5",
    "--tuning.articles=3",
    "--tuning.tokens=60",
    "--tuning.segments=5",
    "--tuning.rule-segments=5",
    "--evaluation.modes=reset",
)


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "--data", "texts", "--run", "run", *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def with_texts(folder: Path) -> Path:
    (folder / "texts").mkdir(parents=True)
    for number in range(6):
        text = "the old cat sees\na dog and a bird .\n" * (4 + 2 * number)
        (folder / f"texts/{number}.txt").write_text(text)
    return folder


def outcome(folder: Path) -> tuple[dict, dict, dict]:
    """Weights; the trials and the scores without what the clock said."""
    weights = {path.name: checkpoint.load(path) for path in (folder / "run").glob("*.safetensors")}
    trials = json.loads((folder / "run/tuning-reset.json").read_text())["trials"]
    for of_method in trials.values():
        for trial in of_method:
            del trial["seconds"]
    results = json.loads((folder / "run/report-test/results.json").read_text())
    return weights, trials, results["modes"]["reset"]["methods"]


@pytest.mark.slow
def test_a_killed_program_ends_as_one_left_alone(tmp_path):
    alone, killed = (with_texts(tmp_path / name) for name in ("alone", "killed"))
    began = time.monotonic()
    with start(alone) as process:
        assert process.wait(600) == 0
    whole = time.monotonic() - began
    statuses = []
    for number in range(KILLS):
        with start(killed) as process:
            try:  # somewhere between the start and the end, later each time
                statuses.append(process.wait(whole * (0.3 + 0.6 * number / KILLS)))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses.append(process.wait())
    assert set(statuses) <= {-signal.SIGKILL, 0}
    assert statuses.count(-signal.SIGKILL) >= 3
    with start(killed) as process:
        assert process.wait(600) == 0
    weights, trials, methods = outcome(killed)
    expected_weights, expected_trials, expected_methods = outcome(alone)
    assert weights.keys() == expected_weights.keys() >= {"base.safetensors", "joint.safetensors"}
    for name, (tensors, meta) in weights.items():
        expected, expected_meta = expected_weights[name]
        assert meta == expected_meta
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[part], expected[part]) for part in expected), name
    assert trials == expected_trials
    assert methods == expected_methods
