import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from metalm.analysis.consolidation_report import consolidation_table, draw_consolidation
from metalm.analysis.figures.appearance import save_figure

GROUPS = {"valid, related": 3, "valid, not related": 4, "held-out B": 0}
BEGINNINGS = (20, 1500)


def effect(share, shift):
    """Figures that are all different; one without an interval."""
    keys = [f"gain, {group}, {tokens}" for group in GROUPS for tokens in BEGINNINGS]
    found = {key: (shift + n / 100, shift, shift + 0.5) for n, key in enumerate(keys)}
    return found | {
        "setting": {"share": share, "elasticity": 0.25},
        "static, valid": (0.99 + shift, None, None),
        "static, old": (1.01 + shift, 1.0, 1.03),
        "static, old, at the end": [1.5, 1.4, 1.6],
    }


@pytest.fixture
def effects():
    return {"elastic": effect(0.1, 0.0), "plain carry": effect(1.0, -0.2)}


def test_every_figure_has_its_cell(effects):
    lines = consolidation_table(effects, GROUPS, BEGINNINGS).splitlines()
    assert lines[:3] == [
        "| | elastic | plain carry |",
        "|---|---|---|",
        "| share, elasticity | 0.1, 0.25 | 1, 0.25 |",
    ]
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines[3:]}
    assert cells["static perplexity, of home's: validation"] == ["0.9900", "0.7900 |"]
    assert cells["the same, after the validation articles"][0] == "1.5000 (1.4000 to 1.6000)"
    name = "gain, nats a word: valid, not related (4), first 1500"
    assert cells[name][0] == "0.0300 (0.0000 to 0.5000)"
    assert len(lines) == 3 + 3 + 4
    assert not any("held-out" in line for line in lines)


def test_the_figure_shows_the_figures(effects, tmp_path):
    figure = draw_consolidation(effects, GROUPS, BEGINNINGS)
    related, other, kept = figure.axes
    for axis, first in ((related, 0.0), (other, 0.02)):
        lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
        np.testing.assert_allclose(lines["elastic"], [first, first + 0.01])
        np.testing.assert_allclose(lines["plain carry"], [first - 0.2, first - 0.19])
    lines = {line.get_label(): line.get_ydata() for line in kept.get_lines()}
    np.testing.assert_allclose(lines["elastic"], [-1.0, 1.0])
    assert related.get_title(loc="left") == "valid, related (3 articles)"
    save_figure(figure, tmp_path / "plot")
    ElementTree.parse(tmp_path / "plot.svg")
