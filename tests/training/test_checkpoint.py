"""Checkpoints: exact, atomic, verified; read back by hand from the documented file format."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from metalm.training import checkpoint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def read_by_hand(path) -> dict[str, tuple[str, list[int], bytes]]:
    """The safetensors format: 8 bytes of length, that much JSON, then the data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    data = content[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_every_type_and_shape_comes_back_exactly(dtype, shape, tmp_path):
    tensor = (torch.randn(shape) * 3).to(dtype)
    checkpoint.save(tmp_path / "x", {"a": tensor}, {})
    found = checkpoint.load(tmp_path / "x")[0]["a"]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor)


def test_a_single_number_cut_out_of_a_longer_row(tmp_path):
    """Torch calls it contiguous, whatever its stride."""
    cut = torch.arange(12).view(3, 4)[:1, -1]
    assert cut.stride() == (4,)
    checkpoint.save(tmp_path / "x", {"a": cut}, {})
    assert checkpoint.load(tmp_path / "x")[0]["a"].tolist() == [3]


def test_the_meta_comes_back_exactly(tmp_path):
    meta = {
        "rate": 0.1 + 0.2,
        "big": 2**130,
        "best": float("inf"),
        "é\n": [None, True, {"x": -0.0}],
    }
    checkpoint.save(tmp_path / "x", {}, meta)
    assert checkpoint.load(tmp_path / "x") == ({}, meta)


def test_the_file_is_plain_safetensors(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoint.save(tmp_path / "x", {"a": torch.from_numpy(array)}, {})
    assert read_by_hand(tmp_path / "x") == {"a": ("F32", [2, 3], array.tobytes())}


def test_a_transposed_tensor_is_stored_in_row_order(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    checkpoint.save(tmp_path / "x", {"a": tensor}, {})
    expected = np.ascontiguousarray(tensor.numpy()).tobytes()
    assert read_by_hand(tmp_path / "x")["a"] == ("F32", [3, 2], expected)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    weight = torch.randn(3, 2)
    checkpoint.save(tmp_path / "x", {"in": weight, "b": torch.ones(1), "out": weight}, {})
    assert sorted(read_by_hand(tmp_path / "x")) == ["b", "in"]
    found, _ = checkpoint.load(tmp_path / "x")
    assert found["in"].data_ptr() == found["out"].data_ptr()
    assert torch.equal(found["out"], weight)


def test_views_of_one_storage_come_back_apart(tmp_path):
    whole = torch.arange(7.0)
    views = {"all": whole, "head": whole[:3], "tail": whole[3:], "grid": whole[:6].view(2, 3)}
    checkpoint.save(tmp_path / "x", views, {})
    found, _ = checkpoint.load(tmp_path / "x")
    assert all(torch.equal(found[name], views[name]) for name in views)
    found["head"].zero_()
    assert torch.equal(found["all"], whole)


def test_every_truncation_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, {"a": torch.arange(3.0)}, {"step": 5})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or altered"):
            checkpoint.load(path)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_every_altered_byte_is_refused_by_name(flip, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, {"step": 5})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            checkpoint.load(path)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="truncated or altered"):
        checkpoint.load(tmp_path / "x")
    assert not (tmp_path / "trapped").exists()


def test_another_programs_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="x is not a checkpoint of this program; expected format"):
        checkpoint.load(tmp_path / "x")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint .*none; expected a file, found nothing"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(ValueError, match="found a folder"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [({"a": {1: 2}}, "key 1; expected text, found int"), ({"a": [torch.ones(1)]}, "is not JSON")],
)
def test_a_meta_that_json_would_change_is_refused(meta, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "x", {}, meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_while_writing_keeps_the_old_file(function, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "x", {"a": torch.zeros(2)}, {"step": 1})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "x", {"a": torch.ones(2)}, {"step": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    tensors, meta = checkpoint.load(tmp_path / "x")
    assert meta == {"step": 1}
    assert torch.equal(tensors["a"], torch.zeros(2))


def test_the_two_newest_are_kept_and_leftovers_removed(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / "checkpoint-old.safetensors").touch()
    (tmp_path / ".checkpoint-000000003.safetensors.77.partial").touch()
    for step in (0, 3, 12, 100):
        path = checkpoint.save_step(tmp_path, step, {}, {"step": step})
        assert path == checkpoint.latest(tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [12, 100]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "checkpoint-000000012.safetensors",
        "checkpoint-000000100.safetensors",
        "checkpoint-old.safetensors",
    ]
