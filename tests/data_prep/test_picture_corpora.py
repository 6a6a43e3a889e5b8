import numpy as np
import pytest
from PIL import Image

from data_prep import picture_corpora
from data_prep.omniglot import PARTS
from data_prep.picture_corpora import find_pictures, prepare_pictures
from metalm.fewshot.tasks.stored_images import open_images


@pytest.fixture
def own(tmp_path):
    """Two classes of grey pictures, each of one brightness."""
    folder = tmp_path / "my pictures"
    for name, brightness in (("dark", 10), ("light", 200)):
        for number in range(3):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 6), brightness + number, np.uint8)).save(path)
    return folder


def test_class_folders_are_prepared_once(own, tmp_path, monkeypatch):
    written = []
    write = picture_corpora.write_pictures
    monkeypatch.setattr(
        picture_corpora, "write_pictures", lambda *a: (written.append(a[1]), write(*a))
    )
    root = tmp_path / "prepared"
    first = prepare_pictures(str(own), size=4, channels=1, root=root)
    assert prepare_pictures(str(own), size=4, channels=1, root=root) == first
    assert first == root / "my-pictures-4"
    assert written == [first]
    images = open_images(first)
    assert images.names == ("dark", "light")
    assert images.pictures[:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]


def test_other_pictures_of_the_same_name_lie_beside(own, tmp_path):
    first = prepare_pictures(str(own), size=4, root=tmp_path)
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(own / "dark" / "9.png")
    second = prepare_pictures(str(own), size=4, root=tmp_path)
    assert second != first
    assert [len(open_images(folder).labels) for folder in (first, second)] == [6, 7]


def test_a_prepared_folder_is_taken_as_it_is(own, tmp_path):
    folder = prepare_pictures(str(own), size=4, root=tmp_path)
    assert prepare_pictures(str(folder), size=4) == folder
    with pytest.raises(ValueError, match="of another size; expected 28 pixels, found 4"):
        prepare_pictures(str(folder))


@pytest.mark.parametrize("asked", [{"channels": 1}, {"dark_ink": True}])
def test_a_prepared_folder_that_was_read_in_another_way_is_refused(own, tmp_path, asked):
    colours = prepare_pictures(str(own), size=4, root=tmp_path)
    with pytest.raises(ValueError, match=r"read in another way; .* found 3, False; leave these"):
        prepare_pictures(str(colours), size=4, **asked)
    as_asked = prepare_pictures(str(own), size=4, root=tmp_path, **asked)
    assert as_asked != colours
    assert prepare_pictures(str(as_asked), size=4, **asked) == as_asked
    assert prepare_pictures(str(as_asked), size=4) == as_asked


def test_a_folder_that_was_cut_short_is_prepared_again(own, tmp_path):
    folder = prepare_pictures(str(own), size=4, root=tmp_path)
    path = folder / "pictures.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert prepare_pictures(str(own), size=4, root=tmp_path) == folder
    assert path.read_bytes() == whole


def test_unknown_pictures(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown pictures; expected omniglot, .* found 'omnigloth'"
    ):
        prepare_pictures("omnigloth", root=tmp_path)


def test_omniglots_own_files_are_recognised(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(picture_corpora, "omniglot_source", lambda *a: asked.append(a))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / f"images_{next(iter(PARTS))}.npz").write_bytes(b"")
    find_pictures(str(folder), tmp_path, channels=3, dark_ink=False)
    find_pictures("omniglot", tmp_path, channels=3, dark_ink=False)
    assert asked == [(folder, folder), (None, tmp_path / "omniglot-archives")]
