import numpy as np

from metalm.analysis.figures.curve_plot import LearntCurve, curve_plot, write_curve_plot

POINTS = np.linspace(-1, 1, 5)
CURVES = [
    LearntCurve(
        POINTS, POINTS**2, (np.array([0.5]), np.array([0.25])), {n: POINTS * n for n in range(3)}
    ),
    LearntCurve(POINTS, -POINTS, (np.array([0.1, 0.2]), np.array([1.0, 2.0])), {0: POINTS}),
]


def drawn(axis):
    return {line.get_label(): np.stack(line.get_data(), -1) for line in axis.lines}


def test_every_answer_the_truth_and_the_points_are_drawn():
    figure = curve_plot(CURVES, title="a $method_")
    assert len(figure.axes) == 2
    lines = drawn(figure.axes[0])
    assert list(lines) == [
        "before", "after 1 update", "after 2 updates", "truth", "points learnt from",
    ]  # fmt: skip
    np.testing.assert_allclose(lines["after 2 updates"], np.stack([POINTS, 2 * POINTS], -1))
    np.testing.assert_allclose(lines["truth"], np.stack([POINTS, POINTS**2], -1))
    np.testing.assert_allclose(lines["points learnt from"], [[0.5, 0.25]])
    np.testing.assert_allclose(
        drawn(figure.axes[1])["points learnt from"], [[0.1, 1.0], [0.2, 2.0]]
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    assert figure.get_suptitle() == r"a \$method_"


def test_later_answers_are_darker():
    line = {line.get_label(): line for line in curve_plot(CURVES[:1]).axes[0].lines}
    one, two = (sum(line[f"after {n}"].get_color()[:3]) for n in ("1 update", "2 updates"))
    assert two < one


def test_the_same_curves_give_the_same_bytes(tmp_path):
    for stem in ("a", "b"):
        write_curve_plot(CURVES, tmp_path / stem)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
