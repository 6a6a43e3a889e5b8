from metalm.analysis.figures.score_plot import score_plot, write_score_plot
from metalm.analysis.statistics.bootstrap import Interval

SCORES = {"one": Interval(54.6, 52.0, 57.0), "$two_": Interval(39.04, None, None)}


def test_marks_and_bars_stand_at_the_numbers():
    (axis,) = score_plot(SCORES, "accuracy, %", title="word " * 40).axes
    marks = [tuple(float(c[0]) for c in line.get_data()) for line in axis.lines]
    assert marks == [(54.6, 1.0), (39.04, 0.0)]
    (bar,) = axis.collections
    assert bar.get_segments()[0].tolist() == [[52.0, 1.0], [57.0, 1.0]]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["one", r"\$two_"]
    assert [note.get_text() for note in axis.texts] == ["54.6", "39"]
    assert axis.get_xlabel() == "accuracy, %"
    assert "\n" in axis.get_title("left")


def test_the_same_scores_give_the_same_bytes(tmp_path):
    for stem in ("a", "b"):
        write_score_plot(SCORES, "accuracy, %", tmp_path / stem)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
