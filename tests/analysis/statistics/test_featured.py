"""The choice of what is drawn; perplexities are set by hand, so that it can be foretold."""

import json
import zlib
from base64 import b64decode
from re import search

import numpy as np
import pytest

from metalm.analysis import ArticleScores, Scores, write_report
from metalm.analysis.figures.appearance import COLOURS, looks
from metalm.analysis.plain_text import in_plot
from metalm.analysis.statistics.featured import family, featured

PERPLEXITY = {
    "static": 145.0,
    "cache": 97.0,
    "dynamic evaluation (SGD)": 90.0,
    "dynamic evaluation (SGD) + cache": 79.0,
    "dynamic evaluation (RMS)": 86.0,
    "dynamic evaluation (RMS) + cache": 80.0,
    "dynamic evaluation (RMS), two rates": 83.0,
    "dynamic evaluation (RMS), two rates + cache": 78.0,
    "metalm, W0 frozen": 84.0,
    "metalm, not learning": 149.0,
    "metalm, segments of 20": 82.7,
    "metalm": 83.5,
    "metalm + cache": 79.4,
    "metalm, two rates": 79.5,
    "metalm, two rates + cache": 77.0,
}
# SGD comes before RMS by its member with the cache, metalm before segments of 20 likewise.
FIRST = {
    "static",
    "dynamic evaluation (SGD)",
    "dynamic evaluation (SGD) + cache",
    "dynamic evaluation (RMS), two rates",
    "dynamic evaluation (RMS), two rates + cache",
    "metalm",
    "metalm + cache",
    "metalm, two rates",
    "metalm, two rates + cache",
}
LEFT_OUT = set(PERPLEXITY) - FIRST


def scored(perplexities: dict[str, float], lengths: tuple[int, ...] = (3,), **more) -> Scores:
    articles = tuple(
        ArticleScores(
            title=f"article {number}",
            words=[f"w{n % 7}" for n in range(length)],
            losses={m: np.full(length, np.log(p)) for m, p in perplexities.items()},
        )
        for number, length in enumerate(lengths)
    )
    return Scores(methods=tuple(perplexities), articles=articles, **more)


def labels(figure) -> set[str]:
    """Names of methods in a figure's legend."""
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_of_many_the_best_two_families_of_each_side_and_those_at_rest_are_chosen():
    chosen = featured([scored(PERPLEXITY)])
    assert set(chosen) == FIRST
    assert list(chosen) == [method for method in PERPLEXITY if method in FIRST]


def test_five_families_are_all_drawn_and_six_are_not():
    five = ["static", "a", "b", "c", "metalm", "metalm + cache", "metalm, x"]
    perplexities = {method: 10.0 + n for n, method in enumerate(five)}
    assert featured([scored(perplexities)]) == tuple(five)
    assert set(featured([scored({**perplexities, "d": 99.0})])) == {*five} - {"c"}


def test_the_best_of_every_mode_come_first_and_then_the_first_mode_decides():
    names = ["static", "a", "b", "c", "metalm", "metalm 2", "metalm 3"]
    first = {"static": 9.0, "a": 3.0, "b": 2.0, "c": 1.0} | dict.fromkeys(names[4:6], 5.0)
    second = {"static": 9.0, "a": 1.0, "b": 2.0, "c": 3.0} | dict.fromkeys(names[4:], 1.5)
    both = {"static", "a", "c", "metalm", "metalm 2"}
    assert set(featured([scored(first), scored(second)])) == both
    assert set(featured([scored(second), scored(first)])) == both
    again = {**second, "a": 2.5, "c": 1.0}  # c is the best of both: b is second in either
    assert set(featured([scored(first), scored(again)])) == {*both} - {"a"} | {"b"}
    worse = {**first, "metalm 2": 5.5}
    flushing = {**second, "metalm 3": 1.0}  # there only in the second mode, and the best of it
    chosen = featured([scored(worse), scored(flushing)])
    assert set(chosen) == {"static", "a", "c", "metalm", "metalm 3"}


def test_every_method_at_rest_is_drawn():
    several = {"rest": 200.0, **PERPLEXITY}
    scores = scored(several, baselines={"metalm": "rest", "cache": "static"})
    assert set(featured([scores])) == {"rest", *FIRST}


def test_one_side_alone_has_its_best_two():
    rivals = {"static": 9.0, **{f"rival {n}": 8.0 - n for n in range(7)}}
    assert featured([scored(rivals)]) == ("static", "rival 5", "rival 6")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("a + cache", "a"),
        ("a + learned cache", "a"),
        ("a", "a"),
        ("b + cache", "b + cache"),
        ("b + learned cache", "b + learned cache"),
        ("cache", "cache"),
        ("learned cache", "learned cache"),
    ],
)
def test_a_family_is_a_method_with_and_without_the_cache(method, name):
    assert family(method, ["a", "a + cache", "b + cache", "cache"]) == name


def test_what_is_drawn_first_has_colours_of_its_own():
    drawn = looks([scored(PERPLEXITY)])
    adaptive = [method for method in FIRST if method != "static"]
    assert {drawn[method].colour for method in adaptive} == set(COLOURS[:4])
    assert not {drawn[method].colour for method in LEFT_OUT - {"metalm, segments of 20"}} & set(
        COLOURS[:4]
    )


@pytest.mark.parametrize("number", [9, 20, 60])
def test_no_two_methods_look_alike_however_many_there_are(number):
    ends = ("", " + cache", " + learned cache")
    methods = [f"m{n}{end}" for n in range(number) for end in ends]
    rest = {f"rest {n}": "static" for n in range(number // 3)}
    scores = scored(dict.fromkeys(["static", *rest, *methods], 2.0), baselines={m: m for m in rest})
    drawn = looks([scores])
    assert len(drawn) == 1 + len(rest) + 3 * number
    assert len(set(drawn.values())) == len(drawn)


def test_no_name_is_cut_in_a_legend():
    for method in PERPLEXITY:
        assert in_plot(method) == method


@pytest.fixture
def figures(monkeypatch) -> dict:
    """What a report draws, by name, which is not written to files."""
    found: dict = {}
    keep = "metalm.analysis.report.save_figure"
    monkeypatch.setattr(keep, lambda figure, stem: found.update({stem.name: figure}))
    return found


def test_plots_and_page_have_the_choice_and_the_report_says_so(tmp_path, figures):
    lengths = (140, 130)
    some = {m: p for m, p in PERPLEXITY.items() if "SGD" not in m and "frozen" not in m}
    modes = {"reset": scored(PERPLEXITY, lengths), "carry": scored(some, lengths)}
    page = write_report(modes, tmp_path, configuration={}, cost={}, command="c")
    assert labels(figures["perplexity_by_position"]) == FIRST
    for name in ("gain_by_position", "gain_by_article", "gain_seen_and_new"):
        assert labels(figures[name]) == FIRST - {"static"}
    assert labels(figures["gain_along_articles"]) == {
        method for method in FIRST if "two rates" in method
    }
    against = {
        label.split(" (over ")[0] for label in labels(figures["gain_over_rival_by_position"])
    }
    assert against == {method for method in FIRST if method.startswith("metalm")}

    text = page.read_text(encoding="utf-8")
    assert text.count("6 of 15 methods are left out") == text.count("![") - 1
    assert text.count("10 of 15 methods are left out") == 1
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    for method in PERPLEXITY:
        assert f"| {method} |" in text
        assert f'<th scope="row">{method}</th>' in source
    facts = json.loads(search(r'id="facts"[^>]*>(.*?)</script>', source)[1])
    for mode, of_mode in zip(facts["modes"], modes.values(), strict=True):
        assert mode["first"] == [method in FIRST for method in of_mode.methods]
    packed = search(r'id="figure-data">(.*?)</script>', source)[1]
    charts = {
        c["name"]: c["figure"] for c in json.loads(zlib.decompress(b64decode(packed)))["reset"]
    }
    lines = charts["perplexity_by_position"]["data"]
    assert [line["meta"] for line in lines] == list(PERPLEXITY)


def test_a_report_of_few_methods_leaves_none_out(simulate, tmp_path, figures):
    page = write_report(
        {"reset": simulate((40, 30))}, tmp_path, configuration={}, cost={}, command=""
    )
    assert "left out: the plot" not in page.read_text(encoding="utf-8")


def test_the_best_of_a_mode_of_its_own_is_drawn(tmp_path, figures):
    other = scored({"static": 9.0, "metalm, other": 8.0}, (40, 30))
    modes = {"reset": scored(PERPLEXITY, (40, 30)), "carry": other}
    page = write_report(modes, tmp_path, configuration={}, cost={}, command="")
    assert "8 of 16 methods are left out" in page.read_text(encoding="utf-8")
    chosen = FIRST - {"static", "metalm", "metalm + cache"} | {"metalm, other"}
    assert labels(figures["gain_by_position"]) == chosen
