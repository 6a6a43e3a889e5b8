"""Several processes: where they meet, what one of them alone does, and how they end."""

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest
import torch

from metalm.training import checkpoint, processes
from metalm.training.record import read


@pytest.fixture(scope="module")
def several():
    path = Path(__file__).with_name("several.py")
    spec = importlib.util.spec_from_file_location("several", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_processes_meet(run_together, several):
    """Every sum, maximum and row written out by hand."""
    ended = run_together(3, several.SEVERAL, "meet")
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    found = [json.loads(printed) for _, printed, _ in ended]
    for rank, one in enumerate(found):
        assert (one["rank"], one["count"]) == (rank, 3)
        assert one["add_up"] == [[[4.5, 4.5]] * 3, [3.0, 30.0]]
        assert one["as_first"] == [0.0, 7.0]
        assert one["sums"] == [4.5, 6.0]
        assert one["highest"] == [2.0, 0.0]
        assert one["of_each"] == [{"mine": 0}, {"mine": 1}, {"mine": 2}]
        assert one["first_alone"] == [1, 0, 0]
        assert one["told"] == ["ToldError" if rank else "ValueError", "no room for process 0"]
    assert found[0]["stacked"] == [[0, 1], [2, 3], [200, 201], [202, 203], [204, 205]]


def test_what_process_0_is_refused_ends_all_and_is_said_once(run_together, several):
    (first, _, said), (second, _, silent) = run_together(2, several.SEVERAL, "refuse")
    assert (first, second) == (2, 2)
    assert said.splitlines()[-1] == "error: no room for process 0"
    assert "no room" not in silent


@pytest.mark.slow
def test_who_is_refused_alone_says_so_and_the_others_that_it_is_gone(run_together, several):
    (first, _, said), (second, _, other) = run_together(2, several.SEVERAL, "fail in 1")
    assert (first, second) == (2, 2)
    assert "error: another process of this run has ended or does not answer; expected all 2" in said
    assert "the last checkpoint too, is kept: see what ended it, then repeat the command" in said
    assert "Traceback" not in said + other
    assert "error in process 1: no room for process 1" in other


def outcome(folder):
    """The last checkpoint and the record, without what the clock said."""
    tensors, meta = checkpoint.load(checkpoint.latest(folder))
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder)]
    return tensors, meta | {"seconds": 0.0}, lines


def assert_same_outcome(folder, other):
    tensors, *rest = outcome(folder)
    expected, *other_rest = outcome(other)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert rest == other_rest


def until_one_waits(folder, started):
    deadline = time.monotonic() + 600
    while not (folder / "waiting").exists():
        assert all(process.poll() is None for process in started)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    several.run(folder)
    return folder


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_one_is_killed_the_other_says_so_and_one_goes_on(
    start_together, several, alone, tmp_path, victim
):
    started = start_together(2, several.SEVERAL, "run", tmp_path, 9, victim)
    until_one_waits(tmp_path, started)
    started[victim].kill()
    _, said = started[1 - victim].communicate(timeout=600)
    started[victim].communicate()
    assert [process.returncode for process in started] == [
        -signal.SIGKILL if rank == victim else 2 for rank in range(2)
    ]
    assert "another process of this run has ended or does not answer" in said
    assert "Traceback" not in said
    assert checkpoint.saved_steps(tmp_path)[-1] == 8
    several.run(tmp_path)
    assert_same_outcome(tmp_path, alone)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step_and_both_go_on(
    start_together, run_together, several, alone, tmp_path
):
    started = start_together(2, several.SEVERAL, "run", tmp_path, 9, 1)
    until_one_waits(tmp_path, started)
    started[1].send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    ended = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2, ended
    assert "training: stopped after 10 steps by SIGTERM; all is saved" in ended[0][1]
    assert ended[1][1] == ""
    assert checkpoint.saved_steps(tmp_path)[-1] == 10
    for status, _, said in run_together(2, several.SEVERAL, "run", tmp_path):
        assert status == 0, said
    assert_same_outcome(tmp_path, alone)


def test_one_by_itself_meets_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tensor = torch.ones(2)
    monkeypatch.setattr(torch, "distributed", None)
    with processes.together():
        assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
        processes.add_up([tensor])
        processes.as_first([tensor])
        assert processes.stacked(tensor, [2]) is tensor
        assert processes.sums(1.5, 2) == processes.highest(1.5, 2) == [1.5, 2]
        assert processes.of_each("a") == ["a"]
        assert processes.first_alone(lambda: 5) == 5
    assert tensor.tolist() == [1, 1]


def test_an_environment_that_does_not_say_where_the_others_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = r"WORLD_SIZE=2, but not where .*expected RANK too, found nothing; start .* torchrun"
    with pytest.raises(ValueError, match=message), processes.together():
        pytest.fail("it has nobody to join")


def test_what_a_launcher_was_asked_for_is_not_left_undone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with processes.together():
        pass
    for name, value, instead in [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--base.bfloat16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--accumulation"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with (
                pytest.raises(ValueError, match=rf"{name} to be .* '{value}'; .* use {instead}"),
                processes.together(),
            ):
                pytest.fail("joined")


def test_what_runs_in_one_process_only(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="reading runs in one process; expected one, found 3; sta"):
        processes.refuse_several("reading")
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.refuse_several("reading")
