import numpy as np
import pytest
from matplotlib.colors import to_hex

from metalm.analysis.figures.episode_plot import (
    RIGHT,
    WRONG,
    AnsweredEpisode,
    episode_plot,
    letter,
    write_episode_plot,
)


@pytest.fixture
def episode():
    random = np.random.default_rng(5)
    return AnsweredEpisode(
        support=random.random((3, 1, 4, 4)),
        support_targets=np.array([1, 0, 2]),
        query=random.random((4, 1, 4, 4)),
        query_targets=np.array([0, 1, 1, 2]),
        answers=np.array([0, 1, 0, 1]),
    )


def colour(patch):
    return to_hex(patch.get_edgecolor()).upper()


def test_queries_stand_beside_the_class_they_are_taken_for(episode):
    (axis,) = episode_plot(episode, title="a task").axes
    pictures = [image.get_array() for image in axis.images]
    rows = [image.get_extent()[2] for image in axis.images]
    expected = [
        # row A: its picture, then queries 0 and 2; row B: its picture, queries 1 and 3; row C
        (episode.support[1], 0), (episode.query[0], 0), (episode.query[2], 0),
        (episode.support[0], 1), (episode.query[1], 1), (episode.query[3], 1),
        (episode.support[2], 2),
    ]  # fmt: skip
    assert len(pictures) == len(expected)
    heights = sorted(set(rows), reverse=True)
    for picture, bottom, (shown, row) in zip(pictures, rows, expected, strict=True):
        np.testing.assert_allclose(picture, shown[0])
        assert bottom == heights[row]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["A", "B", "C"]


def test_wrong_answers_are_marked_and_named(episode):
    (axis,) = episode_plot(episode).axes
    frames = [(colour(patch), patch.get_linestyle()) for patch in axis.patches]
    assert frames == [(RIGHT, "-"), (WRONG, "--"), (RIGHT, "-"), (WRONG, "--")]
    assert [note.get_text() for note in axis.texts] == ["B", "C"]


def test_the_longest_title_stays_in_the_picture(episode):
    title = (
        "lstm-meta-learner: a 20-way 10-shot test task; dashed with a letter: wrong, and what it is"
    )
    figure = episode_plot(episode, title=title)
    figure.draw_without_rendering()
    extent = figure.axes[0]._left_title.get_window_extent()
    assert 0 <= extent.x0 <= extent.x1 <= figure.bbox.width


def test_colour_pictures_and_bytes(episode, tmp_path):
    coloured = episode._replace(
        support=episode.support.repeat(3, 1), query=episode.query.repeat(3, 1)
    )
    (axis,) = episode_plot(coloured).axes
    assert axis.images[0].get_array().shape == (4, 4, 3)
    for stem in ("a", "b"):
        write_episode_plot(episode, tmp_path / stem)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_letters():
    assert [letter(row) for row in (0, 25, 26, 53)] == ["A", "Z", "A1", "B2"]
