import io
import math

import pytest
from rich.console import Console

from metalm.analysis.statistics.scores import ArticleScores, Scores
from metalm.analysis.statistics.summary import (
    best_rival,
    compare_with_rivals,
    matched_rival,
    summarise,
)
from metalm.analysis.tables import (
    articles_grid,
    cost_grid,
    print_tables,
    rivals_grid,
    summary_grid,
    to_rich,
)


def printed(action, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    action(console)
    return console.file.getvalue()


def test_summary_rows_hold_what_the_scores_say(simulate):
    scores = simulate()
    rows = {row.method: row for row in summarise(scores)}
    assert tuple(rows) == scores.methods
    assert rows["static"].gain is None
    assert rows["metalm static"].gain is None
    assert rows["metalm"].baseline == "metalm static"
    assert best_rival(scores) == min(
        ("static", "dynamic evaluation", "cache"), key=scores.perplexity
    )
    for method, row in rows.items():
        quotient = scores.perplexity(method) / scores.perplexity(best_rival(scores))
        assert row.ratio_to_best_rival.estimate == pytest.approx(quotient)


def test_rivals_are_matched_by_their_means(simulate):
    scores = simulate()
    assert scores.perplexity("cache") > scores.perplexity("dynamic evaluation")
    assert matched_rival(scores, "metalm") == "dynamic evaluation"
    words, losses = ["w"], {"static": [3.0], "cache": [1.0], "sgd": [2.0]}
    losses |= {"metalm": [0.5], "metalm + cache": [0.4]}
    scores = Scores(
        methods=tuple(losses), articles=(ArticleScores(title="A", words=words, losses=losses),)
    )
    assert matched_rival(scores, "metalm") == "sgd"
    assert matched_rival(scores, "metalm + cache") == "cache"
    means = ["", ", two rates", ", two rates + cache", ", learned mixture"]
    losses |= {f"sgd{more}": [1.9 - place / 2] for place, more in enumerate(means) if more}
    losses |= {f"metalm{more}": [0.5] for more in means}
    copies = Scores(
        methods=tuple(losses), articles=(ArticleScores(title="A", words=words, losses=losses),)
    )
    assert {more: matched_rival(copies, f"metalm{more}") for more in means} == {
        "": "sgd",
        ", two rates": "sgd, two rates",
        ", two rates + cache": "sgd, two rates + cache",
        ", learned mixture": "sgd, learned mixture",
    }
    assert matched_rival(copies, "metalm, learned mixture + cache") == "sgd, learned mixture"
    assert matched_rival(copies, "metalm + cache") == "cache"
    ours = ("metalm + cache", "metalm + learned cache", "metalm, learned mixture + cache")
    losses |= {"learned cache": [0.3], **{name: [0.2] for name in ours}}
    learned = Scores(
        methods=tuple(losses), articles=(ArticleScores(title="A", words=words, losses=losses),)
    )
    assert [matched_rival(learned, name) for name in ours] == ["cache", *["learned cache"] * 2]
    assert set(compare_with_rivals(scores)) == {"metalm", "metalm + cache"}


def test_tables_fit_into_eighty_columns(simulate):
    scores = simulate()
    cost = {"reset": {m: {"tokens_per_second": 12345.6} for m in scores.methods}}
    text = printed(lambda console: print_tables({"reset": scores}, cost, console))
    assert max(len(line) for line in text.splitlines()) <= 80
    for method in scores.methods:
        assert f"{scores.perplexity(method):.2f}" in text
        assert method in text
    assert "…" not in text
    assert "metalm + cache: against metalm static" in " ".join(text.split())


def test_a_screen_compares_the_best_of_ours_where_there_are_many():
    perplexities = {
        "static": 9.0,
        "a": 8.0,
        "b": 7.0,
        "c": 6.5,
        "d": 6.4,
        "metalm": 6.1,
        "metalm, x": 5.0,
    }
    perplexities["metalm, x + cache"] = 4.0
    losses = {method: [math.log(number)] for method, number in perplexities.items()}
    article = ArticleScores(title="A", words=["w"], losses=losses)
    scores = Scores(methods=tuple(losses), articles=(article,))
    every = rivals_grid(scores, "reset")
    assert every.header == ("rival", "metalm", "metalm, x", "metalm, x + cache")
    assert rivals_grid(scores, "reset", {"metalm"}).header == ("rival", "metalm")
    few = printed(lambda console: print_tables({"reset": scores}, console=console), 200)
    for shown in (4.0, 5.0):
        assert f"{shown / 6.5:.3f}" in few
    assert f"{6.1 / 6.5:.3f}" not in few


def test_titles_cannot_colour_or_control_the_terminal():
    article = ArticleScores(title="[red]x[/red]\x1b[31m[/]", words=["w"], losses={"static": [1.0]})
    scores = Scores(methods=("static",), articles=(article,))
    text = printed(lambda console: console.print(to_rich(articles_grid(scores, "[bold]m"))))
    assert "[red]x[/red]" in text
    assert "[bold]m" in text
    assert "\x1b[31m" not in text


def test_cost_is_divided_by_that_of_static():
    cost = {
        "static": {"tokens_per_second": 800.0, "peak_memory_bytes": 2.0 * 2**20},
        "metalm": {"tokens_per_second": 200.0, "peak_memory_bytes": 3.0 * 2**20, "fallbacks": 2},
        "cache": {},
    }
    rows = {row[0]: row[1:] for row in cost_grid(cost, "reset").rows}
    assert rows["metalm"] == ("200 (0.25)", "3 (1.50)", "2")
    assert rows["static"] == ("800 (1.00)", "2 (1.00)", "—")
    assert rows["cache"] == ("—",) * 3


def test_a_single_static_method_has_a_table():
    article = ArticleScores(title="A", words=["w"], losses={"static": [2.0]})
    scores = Scores(methods=("static",), articles=(article,))
    assert summary_grid(scores, "reset").rows[0] == ("static", "7.39", "—", "1.000")
