import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from metalm.analysis import ArticleScores, Scores, write_report
from metalm.analysis.figures.appearance import looks, save_figure
from metalm.analysis.figures.plots import CAPTIONS, draw_all
from metalm.analysis.statistics.results import as_json, compute


def strict_json(path: Path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def check_files(page: Path) -> list[str]:
    """Every picture of the page is there, whole, as PNG and as SVG; returns their stems."""
    stems = re.findall(r"!\[.*?\]\((plots/\w+)\.png\)", page.read_text(encoding="utf-8"))
    for stem in stems:
        assert (page.parent / f"{stem}.png").read_bytes().startswith(b"\x89PNG\r\n")
        ElementTree.parse(page.parent / f"{stem}.svg")
    return [Path(stem).name for stem in stems]


def test_two_reading_modes_give_all_files_and_their_numbers(simulate, tmp_path):
    scores = {"reset": simulate((700, 130, 300, 270, 513)), "carry": simulate((40, 300, 290), 4)}
    cost = {"reset": {"static": {"tokens_per_second": 5.0, "own": float("inf")}}}
    page = write_report(
        scores,
        tmp_path / "runs" / "one",
        configuration={"rate": 0.1, "path": Path("a/b"), "nested": {"none": None}},
        cost=cost,
        command="python evaluate.py runs/one",
    )
    assert page == tmp_path / "runs" / "one" / "report.md"
    assert check_files(page) == list(CAPTIONS)
    document = strict_json(page.parent / "results.json")
    assert document["command"] == "python evaluate.py runs/one"
    assert document["configuration"] == {"rate": 0.1, "path": "a/b", "nested": {"none": None}}
    assert document["cost"]["reset"]["static"] == {"tokens_per_second": 5.0, "own": None}
    for mode, of_mode in scores.items():
        found = document["modes"][mode]
        assert found["num_words"] == of_mode.num_words.sum()
        assert [a["num_words"] for a in found["articles"]] == of_mode.num_words.tolist()
        for row in found["summary"]:
            assert row["perplexity"] == of_mode.perplexity(row["method"])
            assert f"{row['perplexity']:.2f}" in page.read_text()
        assert sum(found["by_position"]["num_words"]) == of_mode.num_words.sum()
        assert sum(found["by_seen"]["num_words"]) == of_mode.num_words.sum()
    documented = {name.removeprefix("modes.*.") for name in document["schema"]}
    assert {
        name for name, value in document["modes"]["reset"].items() if isinstance(value, dict | list)
    } - {"methods", "baselines", "ours"} <= documented


def test_hostile_names_reach_no_picture_page_or_style(tmp_path):
    bad = "<b>|[x](y) $a$ \x1b[31m\ud800_日本"
    losses = {"static": np.ones(3), bad: np.array([0.5, 0.7, 0.9]), "_own": np.zeros(3)}
    article = ArticleScores(title=bad + "\n# heading", words=["\x00", bad, "\n"], losses=losses)
    scores = Scores(methods=tuple(losses), articles=(article,), ours=("_own",))
    page = write_report(
        {bad: scores}, tmp_path, configuration={bad: bad}, cost={}, command=f"x {bad}\n```\n# y"
    )
    check_files(page)
    prose = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:4] != "    "]
    assert not any("<b>" in line or "\x1b" in line for line in prose)
    assert not any(re.match("# (heading|y)", line) for line in prose)
    document = strict_json(tmp_path / "results.json")
    assert document["modes"][bad]["articles"][0]["title"] == article.title


@pytest.mark.parametrize("num_words", [1, 300])
def test_the_smallest_scores_have_a_report(tmp_path, num_words):
    words = ["w"] * num_words
    article = ArticleScores(title="A", words=words, losses={"static": np.full(num_words, 2.0)})
    scores = Scores(methods=("static",), articles=(article,))
    page = write_report({"reset": scores}, tmp_path, configuration={}, cost={}, command="")
    assert check_files(page) == ["perplexity_by_position"]


def test_the_same_scores_draw_the_same_bytes(simulate, tmp_path):
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        results = {"reset": compute(simulate((60, 200)))}
        name, figure = next(draw_all(results))
        save_figure(figure, folder / name)
        written.append([(folder / f"{name}.{end}").read_bytes() for end in ("png", "svg")])
    assert written[0] == written[1]


def test_drawing_leaves_the_settings_of_matplotlib_alone(simulate):
    before = dict(matplotlib.rcParams)
    for _ in draw_all({"reset": compute(simulate((30, 20)))}):
        pass
    assert dict(matplotlib.rcParams) == before


def test_each_method_looks_different_and_keeps_its_look(simulate):
    scores = simulate((9, 8))
    drawn = looks([scores, scores])
    assert len(set(drawn.values())) == len(scores.methods)
    assert drawn["metalm"].colour == drawn["metalm + cache"].colour
    assert drawn["metalm"].dashes != drawn["metalm + cache"].dashes


def test_nothing_to_report_and_unknown_modes_are_refused(simulate, tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report({}, tmp_path, configuration={}, cost={}, command="")
    with pytest.raises(ValueError, match=r"some of \['reset'\], found \['carry'\]"):
        write_report(
            {"reset": simulate((9,))}, tmp_path, configuration={}, cost={"carry": {}}, command=""
        )
    assert list(tmp_path.iterdir()) == []


def test_json_values_are_plain():
    given = {"a": np.float64("nan"), "b": np.arange(2), 3: (np.int64(4), True, None), "s": {"x"}}
    assert as_json(given) == {"a": None, "b": [0, 1], "3": [4, True, None], "s": ["x"]}
