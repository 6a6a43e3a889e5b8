import json
import math
from dataclasses import replace

import numpy as np
import pytest

from metalm.analysis.report import write_report
from metalm.analysis.statistics.scores import ArticleScores, Scores
from metalm.analysis.statistics.tempered import Tempered, tempered_rows
from metalm.analysis.tables import tempered_grid, to_markdown

TEMPERATURES = {"static": 1.1, "metalm": 1.25, "cache": 0.9}


@pytest.fixture
def both(simulate):
    """Scores at temperature 1, and those of three methods under others."""
    scores = simulate((90, 40, 70))
    articles = [
        ArticleScores(
            title=article.title,
            words=article.words,
            losses={
                name: article.losses[name] * (0.9 + 0.02 * number)
                for number, name in enumerate(TEMPERATURES)
            },
        )
        for article in scores.articles
    ]
    return scores, Tempered(
        temperatures=TEMPERATURES,
        scores=Scores(methods=tuple(TEMPERATURES), articles=tuple(articles)),
    )


def test_one_row_a_method(both):
    scores, tempered = both
    rows = tempered_rows(tempered, scores)
    assert [(row.method, row.temperature) for row in rows] == list(TEMPERATURES.items())
    words = sum(article.num_words for article in scores.articles)
    for number, row in enumerate(rows):
        nats = sum(float(article.losses[row.method].sum()) for article in scores.articles)
        assert row.perplexity_at_1 == pytest.approx(math.exp(nats / words))
        assert row.perplexity == pytest.approx(math.exp(nats * (0.9 + 0.02 * number) / words))
        assert (row.gain is None) == (row.method == "static")
        if row.gain is not None:
            static = sum(float(article.losses["static"].sum()) for article in scores.articles)
            saved = 0.9 * static - nats * (0.9 + 0.02 * number)
            assert row.gain.estimate == pytest.approx(saved / words)


def test_the_table(both):
    scores, tempered = both
    text = to_markdown(tempered_grid(tempered, scores, "reset"))
    rows = tempered_rows(tempered, scores)
    for row in rows:
        cells = f"| {row.temperature:.3g} | {row.perplexity:.2f} | {row.perplexity_at_1:.2f} |"
        assert f"| {row.method} {cells}" in text


def write(scores, tempered, folder):
    page = write_report(
        {"reset": scores, "carry": scores},
        folder,
        configuration={},
        cost={},
        command="this",
        tempered=tempered,
    )
    results = json.loads((folder / "results.json").read_text())
    return results, page.read_text(), (folder / "report.html").read_text()


@pytest.mark.slow
def test_the_report_has_the_table_where_there_are_temperatures(both, tmp_path):
    scores, tempered = both
    results, page, html = write(scores, {"carry": tempered}, tmp_path / "with")
    found = results["tempered"]
    assert list(found) == ["carry"]
    for row, expected in zip(found["carry"], tempered_rows(tempered, scores), strict=True):
        assert row["method"] == expected.method
        assert row["temperature"] == expected.temperature
        np.testing.assert_allclose(row["perplexity"], expected.perplexity)
    assert "tempered.*" in results["schema"]
    title = "With a temperature tuned on validation: carry"
    assert page.count(title) == html.count(title) == 1
    assert "validation: reset" not in page


@pytest.mark.slow
def test_a_report_without_temperatures_does_not_mention_them(both, tmp_path):
    results, page, html = write(both[0], None, tmp_path / "bare")
    assert not any(name.startswith("tempered") for name in (*results, *results["schema"]))
    assert "temperature" not in page
    assert "temperature" not in html


def test_temperatures_of_a_mode_that_was_not_scored(both, tmp_path):
    scores, tempered = both
    with pytest.raises(ValueError, match="tempered names reading modes without scores"):
        write_report(
            {"reset": replace(scores)},
            tmp_path,
            configuration={},
            cost={},
            command="",
            tempered={"carry": tempered},
        )
