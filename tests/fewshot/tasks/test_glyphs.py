import numpy as np
import pytest

from metalm.fewshot.tasks.glyphs import _along, _inked, draw_glyphs


def glyphs(**changes):
    arguments = {"alphabets": 2, "letters": 3, "drawings": 4, "seed": 5, "size": 20} | changes
    return draw_glyphs(**arguments)


def test_the_same_arguments_draw_the_same():
    np.testing.assert_array_equal(glyphs().pictures, glyphs().pictures)
    assert (glyphs().pictures != glyphs(seed=6).pictures).any()


def test_more_letters_leave_the_others_as_they_were():
    few, many = glyphs(), glyphs(letters=5, alphabets=3)
    for number, name in enumerate(few.names):
        other = many.names.index(name)
        np.testing.assert_array_equal(
            few.pictures[few.labels == number], many.pictures[many.labels == other]
        )


def test_classes_and_alphabets():
    drawn = glyphs()
    assert drawn.names[4] == "alphabet02/glyph02"
    assert drawn.groups == ("alphabet01",) * 3 + ("alphabet02",) * 3
    assert np.bincount(drawn.labels).tolist() == [4] * 6


def test_the_pen_leaves_ink_where_the_stroke_is():
    # A level stroke from left to right at the height of pixel row 13 (of 20).
    controls = np.array([[[[0.2, 13.5 / 20], [0.5, 13.5 / 20], [0.8, 13.5 / 20]]]])
    points = _along(controls)
    assert points[0, 0] == pytest.approx([0.2, 0.675])
    assert points[0, -1] == pytest.approx([0.8, 0.675])
    picture = _inked(points, 20)[0]
    assert (picture[13, 5:15] > 200).all()
    assert picture[:11].max() < 5
    assert picture[16:].max() < 5
    assert picture[:, :2].max() < 5


def test_the_ink_of_a_picture_by_loops():
    points = np.random.default_rng(0).uniform(0.1, 0.9, (2, 6, 2))
    found = _inked(points, 9)
    for n in range(2):
        for row in range(9):
            for column in range(9):
                y, x = (row + 0.5) / 9, (column + 0.5) / 9
                pressed = sum(
                    np.exp(-((px - x) ** 2 + (py - y) ** 2) / (2 * 0.025**2))
                    for px, py in points[n]
                )
                assert found[n, row, column] == round(255 * min(1, 0.55 * pressed))


def test_drawings_of_a_glyph_are_alike_but_not_equal():
    drawn = glyphs(letters=12, drawings=6, size=28)
    flat = drawn.pictures.reshape(len(drawn), -1).astype(float)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    same = drawn.labels[:, None] == drawn.labels[None]
    others = distances[same & ~np.eye(len(flat), dtype=bool)]
    assert others.min() > 0
    assert others.mean() < 0.95 * distances[~same].mean()


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="found 2 alphabets, 0 letters"):
        glyphs(letters=0)
