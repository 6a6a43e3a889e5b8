import hashlib
import io
import json
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image

from data_prep import omniglot
from data_prep.omniglot import PARTS, Part, fetch, omniglot_source
from data_prep.picture_source import write_pictures
from metalm.fewshot.tasks.resize import resized
from metalm.fewshot.tasks.splits import official_split
from metalm.fewshot.tasks.stored_images import open_images

OFFICIAL_ARRAYS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "omniglot"

# As in the official files, the order of the numbers is not that of the alphabets' names.
ALPHABETS = {"background": {"Zeta": 2, "Alpha": 1}, "evaluation": {"Beta": 2}}
DRAWINGS = {
    name: np.random.default_rng(number).random((sum(alphabets.values()), 20, 105, 105)) < 0.8
    for number, (name, alphabets) in enumerate(ALPHABETS.items())
}


def archive(name):
    """A zip in the form of the official one, with its entries in another order."""
    entries, number = {}, {"background": 0, "evaluation": 3}[name]
    character = 0
    for alphabet, count in ALPHABETS[name].items():
        for letter in range(count):
            for drawer in range(20):
                place = f"images_{name}/{alphabet}/character{letter + 1:02}"
                file = io.BytesIO()
                Image.fromarray(DRAWINGS[name][character, drawer]).save(file, "PNG")
                key = f"{place}/{number + 1:04}_{drawer + 1:02}.png"
                entries[key] = file.getvalue()
            number, character = number + 1, character + 1
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr(f"images_{name}/", "")
        for key in sorted(entries):
            packed.writestr(key, entries[key])
    return content.getvalue()


ARCHIVES = {name: archive(name) for name in ALPHABETS}


def stand_in(folder):
    """Archives in a folder, and what the program should know about them."""
    folder.mkdir()
    parts = {}
    for name, content in ARCHIVES.items():
        path = folder / f"images_{name}.zip"
        path.write_bytes(content)
        parts[name] = Part(path.as_uri(), hashlib.md5(content).hexdigest(), ALPHABETS[name])
    return parts


@pytest.fixture
def parts(tmp_path):
    return stand_in(tmp_path / "server")


def arrays(folder):
    folder.mkdir()
    for name, images in DRAWINGS.items():
        np.savez(folder / f"images_{name}.npz", images=images)
    return folder


def test_downloaded_prepared_and_opened(tmp_path, parts):
    source = omniglot_source(None, tmp_path / "downloads", parts)
    manifest = write_pictures(source, tmp_path / "out", 28)
    images = open_images(tmp_path / "out")
    assert images.names == (
        *("Zeta/character01", "Zeta/character02", "Alpha/character01"),
        *("Beta/character01", "Beta/character02"),
    )
    assert images.groups == ("Zeta", "Zeta", "Alpha", "Beta", "Beta")
    assert images.parts == ("background",) * 3 + ("evaluation",) * 2
    drawn = np.concatenate(list(DRAWINGS.values())).reshape(100, 1, 105, 105)
    np.testing.assert_array_equal(
        images.pictures, resized(np.where(drawn, 0, 255).astype(np.uint8), 28)
    )
    assert images.labels.tolist() == [number for number in range(5) for _ in range(20)]
    assert manifest["identity"]["size"] == 28
    assert manifest["classes"][0] == {
        **{"name": "Zeta/character01", "pictures": 20},
        **{"group": "Zeta", "part": "background"},
    }


def test_arrays_and_archives_give_the_same(tmp_path, parts):
    folders = {"zip": tmp_path / "server", "npz": arrays(tmp_path / "arrays")}
    opened = []
    for kind, folder in folders.items():
        source = omniglot_source(folder, tmp_path / "nowhere", parts)
        write_pictures(source, tmp_path / kind, 20)
        opened.append(open_images(tmp_path / kind))
    np.testing.assert_array_equal(opened[0].pictures, opened[1].pictures)
    assert opened[0].names == opened[1].names
    assert not (tmp_path / "nowhere").exists()


def test_what_was_downloaded_is_not_fetched_again(tmp_path, parts):
    path = fetch(parts["background"], tmp_path / "downloads")
    assert path.read_bytes() == ARCHIVES["background"]
    gone = parts["background"]._replace(address="file:///nowhere/images_background.zip")
    assert fetch(gone, tmp_path / "downloads") == path


def kept(folder):
    """What lies in the folder beside locks."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_two_programs_do_not_download_into_one_file(tmp_path, parts, monkeypatch):
    """While one downloads, the lock is held; who waited for it takes what is there then."""
    part, downloads, opened = parts["background"], tmp_path / "downloads", []
    urlopen = omniglot.urllib.request.urlopen

    def slow(*arguments, **options):
        with pytest.raises(Timeout):
            FileLock(downloads / ".images_background.zip.lock").acquire(timeout=0)
        opened.append(arguments)
        return urlopen(*arguments, **options)

    @contextmanager
    def another_was_first(root, name):
        root.mkdir()
        (root / name).write_bytes(ARCHIVES["background"])
        yield

    monkeypatch.setattr(omniglot.urllib.request, "urlopen", slow)
    assert fetch(part, downloads).read_bytes() == ARCHIVES["background"]
    assert len(opened) == 1
    monkeypatch.setattr(omniglot, "one_at_a_time", another_was_first)
    assert fetch(part, tmp_path / "later").read_bytes() == ARCHIVES["background"]
    assert len(opened) == 1


def test_another_archive_is_refused_and_not_kept(tmp_path, parts):
    wrong = parts["background"]._replace(md5="0" * 32)
    with pytest.raises(
        ValueError, match=r"expected 0{32} as its MD5, found [0-9a-f]{32}; download"
    ):
        fetch(wrong, tmp_path / "downloads")
    assert kept(tmp_path / "downloads") == []
    with pytest.raises(ValueError, match="is not the official archive"):
        omniglot_source(tmp_path / "server", tmp_path, parts | {"background": wrong})


def test_no_connection_is_one_message(tmp_path, parts):
    gone = parts["background"]._replace(address=(tmp_path / "nowhere.zip").as_uri())
    with pytest.raises(ValueError, match=r"could not be fetched; .* or download the file"):
        fetch(gone, tmp_path / "downloads")
    assert kept(tmp_path / "downloads") == []


def test_missing_files_are_named(tmp_path, parts):
    (tmp_path / "server" / "images_evaluation.zip").unlink()
    with pytest.raises(ValueError, match=r"images_evaluation.zip or images_evaluation.npz, found"):
        omniglot_source(tmp_path / "server", tmp_path, parts)


def test_an_archive_with_other_characters_is_refused(tmp_path, parts):
    other = parts["background"]._replace(alphabets={"Zeta": 1, "Alpha": 2})
    with pytest.raises(ValueError, match=r"expected 3 characters of 2 alphabets .* found 3 char"):
        omniglot_source(tmp_path / "server", tmp_path, parts | {"background": other})


def test_other_arrays_are_refused(tmp_path, parts):
    folder = arrays(tmp_path / "arrays")
    np.savez(folder / "images_evaluation.npz", images=np.zeros((2, 20, 28, 28), bool))
    with pytest.raises(ValueError, match=r"expected images, bool \[2, 20, 105, 105\], found bool"):
        omniglot_source(folder, tmp_path, parts)


def test_the_official_counts():
    for name, characters, alphabets in (("background", 964, 30), ("evaluation", 659, 20)):
        assert sum(PARTS[name].alphabets.values()) == characters
        assert len(PARTS[name].alphabets) == alphabets


def test_a_source_that_fails_leaves_no_manifest(tmp_path, parts):
    source = omniglot_source(tmp_path / "server", tmp_path, parts)
    write_pictures(source, tmp_path / "out", 20)

    def fails(size):
        raise ValueError("refused")

    broken = replace(source, classes=[*source.classes[:2], replace(source.classes[2], read=fails)])
    with pytest.raises(ValueError, match="refused"):
        write_pictures(broken, tmp_path / "out", 20)
    with pytest.raises(ValueError, match=r"expected manifest.json, which is written last, found"):
        open_images(tmp_path / "out")


def damage_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "labels.npy").unlink(), "labels.npy .* as its SHA-256, found no file"),
        (lambda f: (f / "pictures.npy").write_bytes(b"x"), "pictures.npy is not what its manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged; .* JSONDecodeError"),
        (lambda f: damage_manifest(f, format=2), "expected pictures of format 1"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, parts, damage, message):
    write_pictures(omniglot_source(tmp_path / "server", tmp_path, parts), tmp_path / "out", 16)
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as refused:
        open_images(tmp_path / "out")
    assert "remove the folder" in str(refused.value)
    assert "python train.py fewshot --task omniglot" in str(refused.value)


def test_opened_pictures_stay_on_the_disk(tmp_path, parts):
    write_pictures(omniglot_source(tmp_path / "server", tmp_path, parts), tmp_path / "out", 16)
    images = open_images(tmp_path / "out")
    assert isinstance(images.pictures, np.memmap)
    before = (tmp_path / "out" / "pictures.npy").read_bytes()
    images.pictures[0] = 7
    del images
    assert (tmp_path / "out" / "pictures.npy").read_bytes() == before


@pytest.mark.slow
def test_the_official_arrays(tmp_path):
    if not OFFICIAL_ARRAYS.is_dir():
        pytest.skip(f"the official Omniglot arrays are not in {OFFICIAL_ARRAYS}")
    write_pictures(omniglot_source(OFFICIAL_ARRAYS, tmp_path, omniglot.PARTS), tmp_path, 28)
    images = open_images(tmp_path)
    assert (len(images), images.num_classes) == (32_460, 1623)
    split = official_split(images.parts, images.groups, num_validation_groups=5, seed=0)
    assert len(split.train) + len(split.validation) == 964
    # Braille is made of filled dots: nowhere else does so much of the ink lie inside ink. It would
    # not stand out if the alphabets were counted in another order.
    with np.load(OFFICIAL_ARRAYS / "images_background.npz") as arrays:
        ink = ~arrays["images"][:, ::5]
    inside = ink.copy()
    for shift in ((0, 3), (0, -3), (3, 0), (-3, 0)):
        inside &= np.roll(ink, shift, (2, 3))
    shares = inside.sum((1, 2, 3)) / ink.sum((1, 2, 3))
    groups = np.array(images.groups[:964])
    by_group = {group: shares[groups == group].mean() for group in set(groups)}
    first, second = sorted(by_group, key=by_group.get)[:-3:-1]
    assert first == "Braille"
    assert by_group[first] > 2 * by_group[second]
