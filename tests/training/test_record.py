"""What is written is read back: JSON lines, TensorBoard events, progress."""

import io

import pytest

from metalm.training.record import Progress, Record, read


def write(record: Record, steps) -> None:
    for step in steps:
        record.write("train", step, {"loss": step / 7}, seconds=step / 4)


def test_lines_come_back_in_order(tmp_path):
    with Record(tmp_path / "run", tensorboard=False) as record:
        write(record, [1, 2])
    with Record(tmp_path / "run", tensorboard=False) as record:
        assert record.num_lines == 2
        write(record, [3])
    assert read(tmp_path / "run") == [
        {"kind": "train", "step": step, "seconds": step / 4, "values": {"loss": step / 7}}
        for step in (1, 2, 3)
    ]


def test_no_record_is_no_lines(tmp_path):
    assert read(tmp_path) == []


def test_half_a_line_is_forgotten(tmp_path):
    with Record(tmp_path, tensorboard=False) as record:
        write(record, [1, 2])
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[:-3])
    assert [line["step"] for line in read(tmp_path)] == [1]
    with Record(tmp_path, tensorboard=False) as record:
        write(record, [2])
    assert record.path.read_bytes() == whole


@pytest.mark.parametrize(("kept", "expected"), [(0, [9]), (2, [1, 2, 9]), (5, [1, 2, 3, 9])])
def test_rewind_keeps_the_first_lines(kept, expected, tmp_path):
    with Record(tmp_path, tensorboard=False) as record:
        write(record, [1, 2, 3])
        record.rewind(kept, step=kept)
        write(record, [9])
        assert record.num_lines == len(expected)
    assert [line["step"] for line in read(tmp_path)] == expected


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_only_finite_numbers_are_written(value, tmp_path):
    record = Record(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="loss is not finite in the measurement 'train' at step 3"):
        record.write("train", 3, {"loss": value}, seconds=0.0)
    record.close()
    assert read(tmp_path) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_each_step_once_after_a_rewind(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Record(tmp_path) as record:
        write(record, [1, 2, 3, 4])
        record.flush()
    with Record(tmp_path) as record:
        record.rewind(2, step=2)
        write(record, [3])
    shown = events.EventAccumulator(str(tmp_path))
    shown.Reload()
    found = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert found == [(step, pytest.approx(step / 7)) for step in (1, 2, 3)]


def test_away_from_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("metalm.training.record.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress("reading", 5, seconds_between_lines=10, stream=stream) as progress:
        for step in range(5):
            now[0] += 4
            tokens = 60 if step else 1000  # the first were read before the program was stopped
            progress.update(tokens=tokens, values={"loss": step / 8})
    assert stream.getvalue().splitlines() == [
        "reading: 3/5 loss 0.25, tokens/s 15",
        "reading: 5/5 loss 0.5, tokens/s 15",
    ]


def test_on_a_terminal_progress_is_a_bar():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress("reading", 4, initial=1, stream=stream) as progress:
        progress.update(2, tokens=40, values={"loss": 0.7})
        progress.update(1, tokens=20, values={"loss": 0.5})
    last = stream.getvalue().split("\r")[-1]
    assert "reading: 100%" in last
    assert "4/4" in last
    assert "loss=0.5, tokens/s=" in last
