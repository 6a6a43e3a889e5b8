"""The loop against a plain for loop: whatever happens in between, every bit is the same."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from metalm.training import checkpoint, loop
from metalm.training.record import Record, read
from metalm.training.stop import Interrupted

NUM_STEPS = 11


class CrashError(Exception):
    """Stands for a kill inside a step."""


def evaluate(step: int) -> dict[str, float]:
    return {"noise": torch.rand(()).item(), "step": step}


def settings(folder, **changes):
    given = {"num_steps": NUM_STEPS, "folder": folder, "save_every_seconds": 1e9}
    return given | changes


def equal_states(left, right) -> bool:
    (tensors, meta), (others, other_meta) = left.state_dict(), right.state_dict()
    same = tensors.keys() == others.keys() and meta == other_meta
    return same and all(torch.equal(tensors[name], others[name]) for name in tensors)


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder)]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Only a power cut could tell the difference."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["Base", "Meta"])
def make(request, tiny):
    return getattr(tiny, request.param)


@pytest.fixture
def unbroken(make):
    """Trained without the loop."""
    trainable = make()
    for index in range(NUM_STEPS):
        trainable.step(index)
    return trainable


def crash_in(trainable, index: int):
    """After the step has changed everything, before the loop hears of it."""
    step = trainable.step

    def crashing(now: int):
        values = step(now)
        if now == index:
            raise CrashError
        return values

    trainable.step = crashing
    return trainable


def test_equals_a_plain_loop_whatever_is_measured(make, unbroken, tmp_path):
    trainable = make()
    loop.run(trainable, **settings(tmp_path, evaluate=evaluate, evaluate_every=2))
    assert equal_states(trainable, unbroken)


@pytest.mark.parametrize("crash", [0, 3, 4, 7, 10])
@pytest.mark.parametrize("save_every_steps", [1, 4])
def test_a_run_that_crashes_ends_as_if_it_had_not(
    make, unbroken, crash, save_every_steps, tmp_path
):
    asked = {
        "save_every_steps": save_every_steps,
        "evaluate": evaluate,
        "evaluate_every": 3,
        "log_every": 2,
    }
    with Record(tmp_path / "whole", tensorboard=False) as record:
        loop.run(make(), **settings(tmp_path / "whole", record=record, **asked))
    broken = tmp_path / "broken"
    with Record(broken, tensorboard=False) as record, pytest.raises(CrashError):
        loop.run(crash_in(make(), crash), **settings(broken, record=record, **asked))
    # Another seed shows that everything is restored; without a checkpoint the start must be equal.
    trainable = make(seed=1 if checkpoint.latest(broken) else 0)
    with Record(broken, tensorboard=False) as record:
        loop.run(trainable, **settings(broken, record=record, **asked))
    assert equal_states(trainable, unbroken)
    assert lines(broken) == lines(tmp_path / "whole")


def test_a_finished_run_is_only_loaded(make, unbroken, tmp_path):
    loop.run(make(), **settings(tmp_path, evaluate=evaluate, evaluate_every=4))

    def refuse(step):
        raise AssertionError("nothing is left to do")

    trainable = make(seed=1)
    trainable.step = refuse
    loop.run(trainable, **settings(tmp_path, evaluate=refuse, evaluate_every=4))
    assert equal_states(trainable, unbroken)


def test_more_steps_continue_a_finished_run(make, unbroken, tmp_path):
    loop.run(make(), **settings(tmp_path, num_steps=5))
    trainable = make(seed=1)
    loop.run(trainable, **settings(tmp_path))
    assert equal_states(trainable, unbroken)


def test_evaluations_fall_on_multiples_and_on_the_end(tiny, tmp_path):
    steps = []
    loop.run(
        tiny.Base(),
        **settings(tmp_path, evaluate=lambda n: steps.append(n) or {}, evaluate_every=4),
    )
    assert steps == [0, 4, 8, 11]


def test_a_train_line_holds_the_mean_of_its_steps(tiny, tmp_path):
    reference = tiny.Base()
    losses = [reference.step(index)["loss"] for index in range(9)]
    for num_steps in (4, 9):
        with Record(tmp_path, tensorboard=False) as record:
            asked = settings(tmp_path, num_steps=num_steps, record=record, log_every=3)
            loop.run(tiny.Base(), **asked)
    found = {line["step"]: line["values"]["loss"] for line in read(tmp_path)}
    assert found == {end: pytest.approx(sum(losses[end - 3 : end]) / 3) for end in (3, 6, 9)}


@pytest.mark.parametrize(("num_steps", "left"), [(2, 2), (7, 1), (8, 2)])
def test_the_last_train_line_holds_the_mean_of_the_steps_left(tiny, tmp_path, num_steps, left):
    reference = tiny.Base()
    losses = [reference.step(index)["loss"] for index in range(num_steps)]
    whole = []
    for _ in range(2):  # the second time there is nothing to do, and nothing changes
        with Record(tmp_path, tensorboard=False) as record:
            asked = settings(tmp_path, num_steps=num_steps, record=record, log_every=3)
            loop.run(tiny.Base(), **asked)
        whole.append(record.path.read_bytes())
    assert whole[0] == whole[1]
    found = [(line["step"], line["values"]["loss"]) for line in read(tmp_path)]
    expected = [(end, sum(losses[end - 3 : end]) / 3) for end in range(3, num_steps, 3)]
    expected.append((num_steps, sum(losses[-left:]) / left))
    assert found == [(step, pytest.approx(mean)) for step, mean in expected]


def test_a_longer_run_takes_back_the_line_of_the_steps_left(make, tmp_path):
    for folder, lengths in ((tmp_path / "whole", (10,)), (tmp_path / "longer", (4, 5, 10))):
        for num_steps in lengths:
            with Record(folder, tensorboard=False) as record:
                asked = settings(folder, num_steps=num_steps, record=record, log_every=3)
                loop.run(make(), **asked)
    assert lines(tmp_path / "longer") == lines(tmp_path / "whole")


@pytest.mark.parametrize(("cost", "expected"), [(0, [3, 6, 9, 11]), (5, [3, 8, 11])])
def test_the_clock_decides_when_to_save(tiny, tmp_path, monkeypatch, cost, expected):
    """Steps of ten seconds; after a save training gets ten times what it cost, 30 s at least."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    trainable, saved = tiny.Base(), []
    step, state_dict = trainable.step, trainable.state_dict
    trainable.step = lambda index: now.__setitem__(0, now[0] + 10) or step(index)

    def slow_state_dict():
        now[0] += cost
        saved.append(trainable.position)
        return state_dict()

    trainable.state_dict = slow_state_dict
    loop.run(trainable, **settings(tmp_path, save_every_seconds=30))
    assert saved == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_leaves(make, unbroken, number, tmp_path, capfd):
    trainable = make()
    step = trainable.step
    trainable.step = lambda index: (index == 6 and os.kill(os.getpid(), number)) or step(index)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        loop.run(trainable, **settings(tmp_path))
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert checkpoint.saved_steps(tmp_path) == [7]
    assert f"stopped after 7 steps by {signal.Signals(number).name}" in capfd.readouterr().err
    resumed = make(seed=1)
    loop.run(resumed, **settings(tmp_path))
    assert equal_states(resumed, unbroken)


def test_a_signal_ends_an_evaluation_at_once(make, unbroken, tmp_path):
    def interrupted(step: int):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {}

    start = time.monotonic()
    asked = settings(tmp_path, evaluate_every=4)
    with pytest.raises(Interrupted):
        loop.run(make(), evaluate=interrupted, **asked)
    assert time.monotonic() - start < 30
    assert checkpoint.latest(tmp_path) == checkpoint.step_path(tmp_path, 4)
    resumed, evaluated = make(seed=1), []
    loop.run(resumed, evaluate=lambda step: evaluated.append(step) or {}, **asked)
    assert evaluated == [4, 8, 11]
    assert equal_states(resumed, unbroken)


def test_a_second_signal_does_not_wait(tiny, tmp_path):
    trainable = tiny.Base()

    def step(index: int):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    trainable.step = step
    with pytest.raises(KeyboardInterrupt):
        loop.run(trainable, **settings(tmp_path))


def test_runs_outside_the_main_thread(tiny, tmp_path):
    thread = threading.Thread(target=loop.run, args=(tiny.Base(),), kwargs=settings(tmp_path))
    thread.start()
    thread.join()
    assert checkpoint.saved_steps(tmp_path) == [NUM_STEPS]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_step_and_checkpoint(tiny, value, tmp_path):
    trainable = tiny.Base()
    step = trainable.step
    trainable.step = lambda index: {"loss": value} if index == 5 else step(index)
    message = rf"loss is not finite in step 5; expected .*, found {value}; .*checkpoint-000000004"
    with pytest.raises(ValueError, match=message):
        loop.run(trainable, **settings(tmp_path, save_every_steps=2))
    assert checkpoint.saved_steps(tmp_path) == [2, 4]


def test_before_the_first_checkpoint_the_message_says_so(tiny, tmp_path):
    trainable = tiny.Base()
    trainable.step = lambda index: {"loss": float("nan")}
    with pytest.raises(ValueError, match=r"step 0; .*no checkpoint was written yet"):
        loop.run(trainable, **settings(tmp_path))


def test_an_evaluation_that_is_no_number_is_refused(tiny, tmp_path):
    def broken(step: int):
        return {"perplexity": float("nan") if step else 1.0}

    with pytest.raises(ValueError, match="perplexity is not finite in the evaluation after 4"):
        loop.run(tiny.Base(), **settings(tmp_path, evaluate=broken, evaluate_every=4))


def test_weights_that_are_no_numbers_never_replace_good_ones(tiny, tmp_path):
    trainable = tiny.Base()
    step = trainable.step

    def spoil(index: int):
        values = step(index)
        if index == 4:
            torch.nn.init.constant_(trainable.cell.bias_hh, float("nan"))
        return values

    trainable.step = spoil
    with pytest.raises(ValueError, match=r"after 5 steps has NaN in 'cell\.bias_hh'"):
        loop.run(trainable, **settings(tmp_path, save_every_steps=1))
    assert checkpoint.saved_steps(tmp_path) == [3, 4]


def test_another_configuration_is_refused_by_name(tiny, tmp_path):
    saved = {"model": {"sizes": (3, 5), "dropout": 0.1}, "seed": 1}
    loop.run(tiny.Base(), **settings(tmp_path, num_steps=2, configuration=saved))
    loop.run(tiny.Base(), **settings(tmp_path, num_steps=3, configuration=saved))
    other = saved | {"model": {"sizes": (3, 5), "dropout": 0.2}}
    message = r"expected model\.dropout = 0\.2, found 0\.1; repeat the old"
    with pytest.raises(ValueError, match=message):
        loop.run(tiny.Base(), **settings(tmp_path, configuration=other))
    with pytest.raises(ValueError, match="expected seed = nothing, found 1"):
        loop.run(tiny.Base(), **settings(tmp_path, configuration={"model": saved["model"]}))


def test_a_checkpoint_beyond_the_end_is_refused(tiny, tmp_path):
    loop.run(tiny.Base(), **settings(tmp_path))
    with pytest.raises(ValueError, match="expected at most 3 steps, found 11"):
        loop.run(tiny.Base(), **settings(tmp_path, num_steps=3))


def test_a_damaged_checkpoint_is_refused_and_the_older_one_continues(make, unbroken, tmp_path):
    loop.run(make(), **settings(tmp_path, num_steps=6, save_every_steps=3))
    newest = checkpoint.latest(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    trainable = make(seed=1)
    with pytest.raises(ValueError, match=r"checkpoint-000000006\.safetensors is truncated"):
        loop.run(trainable, **settings(tmp_path))
    newest.unlink()
    loop.run(trainable, **settings(tmp_path))
    assert equal_states(trainable, unbroken)


def test_a_fresh_start_forgets_an_old_record(tiny, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 77}) + "\n")
    with Record(tmp_path, tensorboard=False) as record:
        loop.run(tiny.Base(), **settings(tmp_path, num_steps=2, record=record))
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_means_are_over_the_steps_that_have_the_value(make, tmp_path):
    trainable = make()
    step = trainable.step

    def now_and_then(index: int):
        values = {"loss": 1.0 + index}
        step(index)
        return values | ({"norm": 10.0 * index} if index % 2 else {})

    trainable.step = now_and_then
    with Record(tmp_path, tensorboard=False) as record:
        loop.run(trainable, **settings(tmp_path, num_steps=4), record=record, log_every=4)
    (line,) = lines(tmp_path)
    assert line["values"] == {"loss": 2.5, "norm": 20.0}
