import numpy as np
import pytest
from PIL import Image

from data_prep.picture_source import identity, write_pictures
from data_prep.pictures import folder_pictures
from metalm.fewshot.tasks.resize import resized
from metalm.fewshot.tasks.stored_images import open_images

RNG = np.random.default_rng(0)
# "train" and "test" are classes like others; "[a]" is not a pattern.
COUNTS = {"train": 2, "test": 3, "[a] b": 1, "zebra": 2}


def write_folder(folder, prefix=""):
    """Class folders with colour pictures of unequal sizes; returns the pictures by path."""
    written = {}
    for name, count in COUNTS.items():
        for number in range(count):
            path = folder / f"{prefix}{name}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = RNG.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            written[path] = pixels
    return written


def test_class_folders_prepared_and_opened(tmp_path):
    written = write_folder(tmp_path / "own[1]")
    (tmp_path / "own[1]" / "zebra" / "notes.txt").write_text("no picture")
    manifest = write_pictures(folder_pictures(tmp_path / "own[1]"), tmp_path / "out", 8)
    images = open_images(tmp_path / "out")
    assert images.names == ("[a] b", "test", "train", "zebra")
    assert np.bincount(images.labels).tolist() == [1, 3, 2, 2]
    assert images.shape == (3, 8, 8)
    assert images.groups is None
    for row, path in enumerate(sorted(written, key=lambda each: (each.parent.name, each.name))):
        expected = resized(written[path].transpose(2, 0, 1)[None], 8)[0]
        np.testing.assert_array_equal(images.pictures[row], expected)
        assert images.names[images.labels[row]] == path.parent.name
    assert manifest["name"] == "own[1]"


def test_grey_pictures_of_dark_ink(tmp_path):
    (tmp_path / "own" / "a").mkdir(parents=True)
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).save(tmp_path / "own/a/x.png")
    source = folder_pictures(tmp_path / "own", channels=1, dark_ink=True)
    write_pictures(source, tmp_path / "out", 2)
    pictures = open_images(tmp_path / "out").pictures
    np.testing.assert_array_equal(pictures, [[[[255, 0], [0, 255]]]])


def test_groups_of_classes(tmp_path):
    write_folder(tmp_path / "own", "one/")
    write_folder(tmp_path / "own", "two/")
    write_pictures(folder_pictures(tmp_path / "own"), tmp_path / "out", 8)
    images = open_images(tmp_path / "out")
    assert images.names[:2] == ("one/[a] b", "one/test")
    assert images.groups == ("one",) * 4 + ("two",) * 4


def test_other_pictures_and_other_readings_have_another_identity(tmp_path):
    write_folder(tmp_path / "own")

    def found(size=8, **changes):
        return str(identity(folder_pictures(tmp_path / "own", **changes), size))

    before = found()
    assert found() == before
    assert len({before, found(size=9), found(channels=1), found(dark_ink=True)}) == 4
    (tmp_path / "own" / "zebra" / "1.png").rename(tmp_path / "own" / "train" / "9.png")
    assert found() != before


def test_a_picture_that_is_none_is_named_with_its_class(tmp_path):
    write_folder(tmp_path / "own")
    (tmp_path / "own" / "zebra" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"class 'zebra' cannot be read; .*zebra.bad.png; replace"):
        write_pictures(folder_pictures(tmp_path / "own"), tmp_path / "out", 8)


def test_folders_without_order_are_refused(tmp_path):
    write_folder(tmp_path / "own")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "own" / "loose.png")
    with pytest.raises(ValueError, match="found some in the folder itself; move them"):
        folder_pictures(tmp_path / "own")
    write_folder(tmp_path / "mixed")
    write_folder(tmp_path / "mixed", "group/")
    with pytest.raises(ValueError, match="found some in both; move them"):
        folder_pictures(tmp_path / "mixed")
    with pytest.raises(ValueError, match="expected one of them, found 2"):
        folder_pictures(tmp_path / "own", channels=2)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_pictures_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"no pictures in .*{name}; .* check the path"):
        folder_pictures(tmp_path / name)
