"""train.py and evaluate.py in two processes, against one; and a launcher whose worker is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from metalm.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the", "a", "cat", "dog", "sees", "runs", "and", "old", "house", "tree")
SMALL = (
    "--data=texts",
    "--run=run",
    "--preset=tiny",
    "--threads=1",
    "--data.vocabulary-size=300",
    "--model.embedding-size=4",
    "--model.hidden-size=6",
    "--base.rows=3",
    "--base.window=10",
    "--rule.tokens=400",
    "--rule.rows=3",
    "--rule.segment=5",
    "--rule.unroll=2",
    "--joint.tokens=400",
    "--joint.rows=3",
    "--joint.segment=5",
    "--joint.unroll=2",
    "--tuning.articles=2",
    "--tuning.tokens=20",
    "--tuning.segments=5",
    "--tuning.rule-segments=5",
    "--evaluation.modes",
    "reset",
    "carry",
)
pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path):
    """A folder with a dozen short files of made-up sentences."""
    (tmp_path / "texts").mkdir()
    random = np.random.default_rng(2)
    for number in range(12):
        lines = (" ".join(random.choice(WORDS, 5)) for _ in range(2 + number))
        (tmp_path / f"texts/{number}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def perplexities(folder):
    """Of every method on every article, in both modes."""
    results = json.loads((folder / "run/report-test/results.json").read_text())
    return {
        (mode, article["title"], name): perplexity
        for mode, of_mode in results["modes"].items()
        for article in of_mode["articles"]
        for name, perplexity in article["perplexity"].items()
    }


def test_two_processes_train_and_score_as_one_does(texts, run_together):
    one, two = texts / "one", texts / "two"
    for folder in (one, two):
        shutil.copytree(texts / "texts", folder / "texts")
    words = [ROOT / "train.py", *SMALL, "--base.tokens=2000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=one, env=environment, check=True)
    (first, printed, said), (second, silent, other) = run_together(2, *words, cwd=two)
    assert (first, second) == (0, 0), said + other
    assert "report: run/report-test/report.md" in printed
    assert silent == ""
    assert "tuning" not in other

    def files(folder):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        # Named for a checksum of the weights, or for the time; the last is named by the clock.
        kept = ("readings", "events", "checkpoint")
        return {name for name in names if not any(part in name for part in kept)}

    assert files(two) == files(one)
    for name in ("base", "control", "rule", "joint"):
        tensors, _ = checkpoint.load(two / f"run/{name}.safetensors")
        expected, _ = checkpoint.load(one / f"run/{name}.safetensors")
        assert tensors.keys() == expected.keys()
        for part, tensor in tensors.items():
            # Float32, and Adam divides by what may be near zero.
            torch.testing.assert_close(tensor, expected[part], rtol=1e-2, atol=1e-3, msg=part)
    found, expected = perplexities(two), perplexities(one)
    assert found.keys() == expected.keys()
    for name, perplexity in expected.items():
        assert found[name] == pytest.approx(perplexity, rel=1e-3), name

    # The same weights, tuned and scored by two: the same but for roundings of float32.
    for path in (*(two / "run").glob("*-reset*"), *(two / "run").glob("*-carry*")):
        path.unlink()
    shutil.rmtree(two / "run/report-test")
    for path in (one / "run").glob("*.safetensors"):
        shutil.copy(path, two / "run")
    shutil.rmtree(two / "run/readings")
    for status, _, said in run_together(2, ROOT / "evaluate.py", "run", cwd=two):
        assert status == 0, said
    found = perplexities(two)
    for name, perplexity in expected.items():
        assert found[name] == pytest.approx(perplexity, rel=1e-5), name


def test_a_launch_that_is_stopped_or_whose_worker_is_killed_is_gone_on_with(texts):
    words = [ROOT / "train.py", *SMALL, "--base.tokens=60000", "--no-evaluation", "--stages=base"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["--"]  # torchrun would take --run for one of its own
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": texts, "env": environment, "stdout": subprocess.DEVNULL}
    stage, holder = texts / "run/stages/base", texts / "run/.lock-holder.json"

    def until_it_trains(launched):
        """Until lines are written that were not there before."""
        before = (stage / "metrics.jsonl").read_text() if stage.exists() else ""
        deadline = time.monotonic() + 600
        while not stage.exists() or (stage / "metrics.jsonl").read_text() in (before, ""):
            assert launched.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    said = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launch, *words], **options, **said) as launched:
        until_it_trains(launched)
        launched.terminate()
        _, words_of_all = launched.communicate(timeout=600)
    assert words_of_all.count("steps by SIGTERM; all is saved, the same command continues") == 1
    saved = checkpoint.latest(stage).read_bytes()

    with subprocess.Popen([*launch, *words], **options, **said) as launched:
        until_it_trains(launched)
        os.kill(json.loads(holder.read_text())["process"], signal.SIGKILL)
        _, words_of_all = launched.communicate(timeout=600)
    assert launched.returncode != 0
    assert "error in process 1: another process of this run has ended" in words_of_all
    assert "SIGKILL" in words_of_all
    assert checkpoint.latest(stage).read_bytes() == saved
    assert not (texts / "run/base.safetensors").exists()

    subprocess.run([sys.executable, *words], check=True, **options)
    assert (texts / "run/base.safetensors").exists()


def test_accelerate_starts_two_processes_too(texts):
    one, two = texts / "one", texts / "two"
    for folder in (one, two):
        shutil.copytree(texts / "texts", folder / "texts")
    program = texts / "noted.py"  # train.py, and a note of who runs it
    program.write_text(
        "import os, runpy\n"
        "open(f\"{os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}\", 'w').close()\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    words = [program, *SMALL, "--base.tokens=2000", "--no-evaluation", "--stages=base"]
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0"]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "check": True}
    subprocess.run([sys.executable, *words], cwd=one, **options)
    subprocess.run([*launch, *words], cwd=two, **options)
    assert {path.name for path in two.glob("* of *")} == {"0 of 2", "1 of 2"}
    tensors, _ = checkpoint.load(two / "run/base.safetensors")
    expected, _ = checkpoint.load(one / "run/base.safetensors")
    for part, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[part], rtol=1e-2, atol=1e-3, msg=part)
