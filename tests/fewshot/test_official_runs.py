import math

import numpy as np
import pytest
import torch
from PIL import Image

from metalm.fewshot.hausdorff import hausdorff_scores, ink_points, modified_hausdorff
from metalm.fewshot.methods.pixels import NearestPixels
from metalm.fewshot.official_runs import judge_of, read_runs, score_runs
from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.resize import resized

CLASSES = 5


def write_png(path, ink):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ink < 128).save(path)  # one bit a pixel, white paper, as the official files


def write_runs(folder, *, runs=2, prefix=False):
    """Glyphs in the form of all_runs.zip; returns them, and the letters of each run's tests."""
    drawn = draw_glyphs(alphabets=runs, letters=CLASSES, drawings=2, seed=0, size=105)
    ink = drawn.pictures.reshape(runs, CLASSES, 2, 105, 105)
    orders = []
    for run in range(runs):
        name = f"run{run + 1:02}"
        order = np.random.default_rng(run).permutation(CLASSES)
        lines = []
        for item, letter in enumerate(order):
            write_png(folder / name / f"training/class{letter + 1:02}.png", ink[run, letter, 0])
            write_png(folder / name / f"test/item{item + 1:02}.png", ink[run, letter, 1])
            before = f"{name}/" if prefix else ""
            lines.append(
                f"{before}test/item{item + 1:02}.png {before}training/class{letter + 1:02}.png"
            )
        (folder / name / "class_labels.txt").write_text("\n".join(lines) + "\n")
        orders.append(order)
    return ink, orders


@pytest.mark.parametrize("prefix", [False, True])
def test_runs_are_read_as_they_were_written(tmp_path, prefix):
    ink, orders = write_runs(tmp_path, prefix=prefix)
    runs = read_runs(tmp_path)
    assert [run.name for run in runs] == ["run01", "run02"]
    for number, run in enumerate(runs):
        black = torch.from_numpy(np.where(ink[number] < 128, 0, 255).astype(np.uint8))
        assert torch.equal(run.training, black[:, 0])
        assert torch.equal(run.tests, black[orders[number], 1])
        assert run.answers.tolist() == orders[number].tolist()


def test_errors_by_hand(tmp_path):
    write_runs(tmp_path)
    runs = read_runs(tmp_path)

    def knows_all_but_one(training, tests):
        run = next(each for each in runs if torch.equal(each.tests, tests))
        wanted = run.answers.clone()
        if run.name == "run02":
            wanted[3] = (wanted[3] + 1) % CLASSES
        return torch.eye(CLASSES)[wanted]

    scores = score_runs(runs, knows_all_but_one)
    assert scores.errors == (0.0, 20.0)
    assert scores.mean == 10.0
    first = score_runs(runs, lambda training, tests: torch.ones(len(tests), len(training)))
    assert first.errors == (80.0, 80.0)  # the first class is right once


def brute_force_distance(one, other):
    """As the definition says, pixel by pixel."""

    def points(ink):
        found = [(r, c) for r in range(len(ink)) for c in range(len(ink)) if ink[r][c] >= 128]
        middle = [sum(p[i] for p in found) / len(found) for i in (0, 1)]
        return [(r - middle[0], c - middle[1]) for r, c in found]

    a, b = points(one.tolist()), points(other.tolist())
    there = sum(min(math.dist(p, q) for q in b) for p in a) / len(a)
    back = sum(min(math.dist(p, q) for q in a) for p in b) / len(b)
    return max(there, back)


def test_modified_hausdorff_by_brute_force():
    drawn = draw_glyphs(alphabets=1, letters=3, drawings=2, seed=1, size=24)
    pictures = torch.from_numpy(drawn.pictures[:, 0])
    found = hausdorff_scores(pictures[:4], pictures[3:])
    for i in range(3):
        for j in range(4):
            expected = brute_force_distance(pictures[3 + i], pictures[j])
            assert float(found[i, j]) == pytest.approx(-expected, abs=1e-9)
    assert float(found[0, 3]) == 0


def test_modified_hausdorff_by_hand():
    one = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    other = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 6.0]])
    # There, the mean of 0 and 2; back, the mean of 0, 3 and 4.
    assert modified_hausdorff(one, other) == pytest.approx(7 / 3)
    assert modified_hausdorff(other, one) == pytest.approx(7 / 3)


def test_where_a_picture_lies_plays_no_part():
    picture = torch.zeros(12, 12, dtype=torch.uint8)
    picture[2:5, 3] = 255
    picture[4, 3:7] = 200
    moved = picture.roll((4, 3), (0, 1))
    torch.testing.assert_close(ink_points(picture), ink_points(moved))
    assert float(ink_points(picture).sum()) == pytest.approx(0, abs=1e-9)


def test_hausdorff_scores_the_generated_challenge(tmp_path):
    ink, orders = write_runs(tmp_path, runs=3)
    scores = score_runs(read_runs(tmp_path), hausdorff_scores)
    for run in range(3):
        wrong = 0
        for letter in orders[run]:
            test = torch.from_numpy(ink[run, letter, 1])
            near = [
                modified_hausdorff(ink_points(test), ink_points(torch.from_numpy(ink[run, k, 0])))
                for k in range(CLASSES)
            ]
            wrong += near.index(min(near)) != letter
        assert scores.errors[run] == pytest.approx(100 * wrong / CLASSES)
    assert scores.mean < 80  # guessing


def test_a_method_judges_pictures_of_its_own_size(tmp_path):
    write_runs(tmp_path, runs=1)
    (run,) = read_runs(tmp_path)
    found = judge_of(NearestPixels(), 14)(run.training, run.tests)
    small = [
        resized(each[:, None].numpy(), 14).reshape(CLASSES, -1).astype(float) / 255
        for each in (run.training, run.tests)
    ]
    expected = -np.linalg.norm(small[1][:, None] - small[0][None], axis=-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def damaged(folder, change):
    write_runs(folder)
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "run01").rename(f / "run03"), "without a gap .*, found run02, run03"),
        (lambda f: (f / "run02/class_labels.txt").unlink(), "run02.class_labels.txt, found no"),
        (lambda f: (f / "run02/test/item03.png").unlink(), "in one alone item03.png"),
        (
            lambda f: (f / "run01/class_labels.txt").write_text(
                "test/item01.png training/class01.png\ntest/item02.png training/class03.png\n"
            ),
            "not the same; .* in one alone class02.png, class04.png, class05.png",
        ),
        (
            lambda f: (f / "run01/training/class02.png").write_bytes(b"nothing"),
            "expected a PNG at .*class02.png, found no picture",
        ),
        (
            lambda f: write_png(f / "run01/training/class02.png", np.zeros((28, 30))),
            "class02.png has another size; expected 105 x 105 pixels, found 30 x 28",
        ),
        (
            lambda f: (f / "run01/class_labels.txt").write_text("test/item01.png\n"),
            "line 1 of .* is not a pair; .* found 'test/item01.png'",
        ),
        (
            lambda f: (f / "run01/class_labels.txt").write_text(
                2 * "test/item01.png training/class01.png\n"
            ),
            "expected different tests, found 2 lines for 1",
        ),
        (lambda f: (f / "run01/class_labels.txt").write_text("\n"), "found 0 lines for 0"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_runs(damaged(tmp_path, change))


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(20 in the challenge\), found none; unpack"):
        read_runs(tmp_path)


def test_a_picture_without_ink_is_refused():
    with pytest.raises(ValueError, match="found none of 12"):
        ink_points(torch.full((3, 4), 127, dtype=torch.uint8))
