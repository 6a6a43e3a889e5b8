"""The assembled page, read with a parser of its own kind.

`test_page_in_browser.py` looks at it in a browser.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from metalm.analysis import ArticleScores, Scores, Trace
from metalm.analysis.figures.figure_parts import in_figure
from metalm.analysis.page.html_page import build_page, in_script
from metalm.analysis.statistics.results import compute
from metalm.analysis.statistics.traces import DISTANCE

HOSTILE = "%{x}</script><img src=x onerror=alert(1)>\u2028<!--&amp;\ud800 https://example.org"

# What plotly reads as a subset of HTML.
PARSED = ("name", "text", "hovertemplate", "hovertext")


class Page(HTMLParser):
    """Elements with their attributes and text, as a browser would find them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[int] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "br"):
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for place in self.open:
            self.elements[place][2].append(data)

    def all(self, tag, **attributes):
        return [
            (found, "".join(text))
            for name, found, text in self.elements
            if name == tag and attributes.items() <= found.items()
        ]

    def text(self, identifier):
        ((text,),) = [(text,) for _, a, text in self.elements if a.get("id") == identifier]
        return "".join(text)

    def inflated(self, identifier):
        return zlib.decompress(base64.b64decode(self.text(identifier), validate=True))

    @property
    def facts(self):
        return json.loads(self.text("facts"))

    @property
    def step(self):
        ((attributes, _),) = self.all("script", id="facts")
        return float(attributes["data-step"])


def build(scores, **changes):
    given = {"title": "t", "configuration": {}, "cost": {}, "command": "c", **changes}
    return build_page({mode: compute(of_mode) for mode, of_mode in scores.items()}, **given)


def hostile_scores():
    names = ("static", HOSTILE, "metalm")
    losses = {name: np.linspace(1, 2, 5) * n for n, name in enumerate(names, 1)}
    words = ["a", HOSTILE, "\n", "<b>", "\n"]
    article = ArticleScores(title=HOSTILE, words=words, losses=losses)
    return {HOSTILE: Scores(methods=names, articles=(article, article))}


def test_the_page_has_its_parts_and_every_element_is_closed(simulate):
    page = Page(build({"reset": simulate((90, 40)), "carry": simulate((90, 40), 4)}))
    assert page.open == []
    identifiers = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    for wanted in ("article", "method", "against", "scale", "text", "figures", "methods", "modes"):
        assert wanted in identifiers
    assert len(page.all("section", **{"class": "mode"})) == 2


def test_the_tables_have_the_figures(simulate):
    scores = simulate((90, 40, 77))
    ((_, text),) = Page(build({"reset": scores})).all("section", **{"data-mode": "0"})
    for method in scores.methods:
        assert f"{scores.perplexity(method):.2f}" in text


def test_the_policy_names_the_scripts_and_styles_and_nothing_else(simulate):
    page = Page(build({"reset": simulate((20, 10))}))
    ((attributes, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    policy = dict(part.strip().split(" ", 1) for part in attributes["content"].split(";"))
    assert policy["default-src"] == "'none'"
    executed = [text for a, text in page.all("script") if "type" not in a]
    assert len(executed) == 1
    scripts = [*executed, page.inflated("plotly").decode()]
    styles = [text for _, text in page.all("style")] + [""]
    for key, contents in (("script-src", scripts), ("style-src-elem", styles)):
        digests = [hashlib.sha256(content.encode()).digest() for content in contents]
        wanted = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
        assert set(policy[key].split()) == wanted
    assert {v for k, v in policy.items() if k not in ("script-src", "style-src-elem")} == {
        "'none'",
        "data: blob:",
        "'unsafe-inline'",
    }
    assert policy["style-src-attr"] == "'unsafe-inline'"


def test_the_page_asks_for_nothing(simulate):
    page = Page(build({"reset": simulate((20, 10))}))
    asked = [a[name] for _, a, _ in page.elements for name in ("src", "href") if name in a]
    assert all(address.startswith(("#", "data:,")) for address in asked)
    assert not [name for _, a, _ in page.elements for name in a if name.startswith("on")]
    ((_, style),) = page.all("style")
    assert "url(" not in style
    assert "@import" not in style


def test_words_losses_and_sums_come_back(simulate):
    scores = {"reset": simulate((60, 25, 33)), "carry": simulate((60, 25, 33), 4)}
    page = Page(build(scores))
    vocabulary = json.loads(page.inflated("vocabulary"))
    for mode in page.facts["modes"]:
        for shown, article in zip(mode["articles"], scores[mode["key"]].articles, strict=True):
            text = page.facts["texts"][shown["text"]]
            numbers = np.frombuffer(page.inflated(f"text-{shown['text']}"), np.uint8)
            numbers = numbers.reshape(3, len(text["columns"]) + 1, text["words"]).astype(int)
            numbers = numbers[0] + 256 * numbers[1] + 65536 * numbers[2]
            assert [vocabulary[n] for n in numbers[0]] == article.words
            found = {}
            for number, folded in zip(text["columns"], numbers[1:], strict=True):
                column = page.facts["columns"][number]
                own = np.where(folded % 2, -(folded + 1) // 2, folded // 2)
                found[number] = own + found.get(column["parent"], 0)
                if column["mode"] == mode["key"]:
                    losses = article.losses[column["method"]]
                    assert np.abs(found[number] * page.step - losses).max() <= page.step / 2 + 1e-9
            sums = [article.losses[method].sum() for method in mode["keys"]]
            assert shown["nats"] == pytest.approx(sums, abs=0.006)


def test_untrusted_text_stays_text():
    source = build(
        hostile_scores(),
        title=HOSTILE,
        configuration={HOSTILE: HOSTILE},
        cost={HOSTILE: {HOSTILE: {"tokens_per_second": 3.0}}},
        command=f"python {HOSTILE}\n{HOSTILE}",
    )
    page = Page(source)
    assert page.open == []
    assert page.all("img") == []
    assert page.all("b") == []
    assert len([a for a, _ in page.all("script") if "type" not in a]) == 1
    assert not any("onerror" in a for _, a, _ in page.elements)
    assert "\u2028" not in source
    assert "\ud800" not in source
    (mode,) = page.facts["modes"]
    assert mode["key"] == HOSTILE
    assert HOSTILE in mode["keys"]
    assert HOSTILE in json.loads(page.inflated("vocabulary"))
    configuration = page.all("pre")[1][1]
    assert json.loads(configuration) == {HOSTILE: HOSTILE}


def test_plotly_finds_no_markup_in_names():
    """In what plotly shows, only tags that this project wrote are tags."""
    figures = json.loads(Page(build(hostile_scores())).inflated("figure-data"))
    shown = []

    def collect(value, key=""):
        if isinstance(value, dict):
            for name, item in value.items():
                collect(item, name)
        elif isinstance(value, list):
            for item in value:
                collect(item, key)
        elif isinstance(value, str) and key in PARSED:
            shown.append((key, value))

    collect([chart["figure"] for chart in figures[HOSTILE]])
    assert {key for key, text in shown if "onerror" in text} == set(PARSED)
    for key, text in shown:
        assert set(re.findall(r"<[^>]*>?", text)) <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}
        assert key != "hovertemplate" or "%{x}" not in text


@pytest.mark.parametrize("text", ["<a href='x'>y</a>", "a & b", "1 < 2", "&lt;"])
def test_in_figure_is_undone_by_reading_it_as_html(text):
    assert html.unescape(in_figure(text)) == text
    assert "<" not in in_figure(text)


@pytest.mark.parametrize("value", [HOSTILE, {"</script>": ["&", "\u2029"]}, 1.5, None])
def test_json_in_a_script_is_the_same_value_without_markup(value):
    text = in_script(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&\n") & set(text)


def test_the_curves_are_the_results(simulate):
    results = compute(simulate((300, 290, 280, 270, 260)))
    page = Page(build_page({"reset": results}, title="t", configuration={}, cost={}, command="c"))
    charts = {chart["name"]: chart for chart in json.loads(page.inflated("figure-data"))["reset"]}
    assert set(charts) >= {"gain_by_position", "gain_along_articles", "gain_by_article"}
    for line in charts["gain_by_position"]["figure"]["data"]:
        gains = results.by_position.gain[line["meta"]]
        assert line["y"] == pytest.approx([gain.estimate for gain in gains], rel=1e-4)
        high = np.array(line["y"]) + line["error_y"]["array"]
        assert high == pytest.approx([gain.high for gain in gains], rel=1e-3)
    along = charts["gain_along_articles"]["figure"]["data"][0]
    course = results.succession.gain[along["meta"]]
    found = [(x, y) for x, y in zip(along["x"], along["y"], strict=True) if y is not None]
    assert [y for _, y in found] == pytest.approx([course[int(x)] for x, _ in found], rel=1e-4)
    # A gap where each article ends.
    ends = [x for x, y in zip(along["x"], along["y"], strict=True) if y is None]
    assert ends == np.cumsum([300, 290, 280, 270, 260]).tolist()


def test_recorded_curves_are_drawn_along_the_articles(simulate):
    trace = Trace(
        method="metalm",
        quantity=DISTANCE,
        name="embedding",
        words=[np.array([5.0, 10.0]), np.array([7.0])],
        values=[np.array([0.1, 0.2]), np.array([0.3])],
    )
    page = Page(build({"reset": simulate((20, 10))}, traces={"reset": [trace]}))
    charts = json.loads(page.inflated("figure-data"))["reset"]
    (chart,) = [chart for chart in charts if chart["name"] == "recorded_distance"]
    (line,) = chart["figure"]["data"]
    points = [(x, y) for x, y in zip(line["x"], line["y"], strict=True) if y is not None]
    assert points == [(5, 0.1), (10, 0.2), (27, 0.3)]


def test_a_trace_whose_places_and_values_differ_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a value a place .* found \[1\] values for \[2\]"
    ):
        Trace(
            method="m",
            quantity=DISTANCE,
            name="t",
            words=[np.zeros(2)],
            values=[np.zeros(1)],
        )


def test_a_page_that_would_be_too_large_keeps_fewer_words_and_says_so(simulate):
    scores = {"reset": simulate((900, 800, 850))}
    whole = build(scores)
    around = len(whole.encode()) - sum(
        len(text) for a, text in Page(whole).all("script") if a.get("id", "").startswith("text-")
    )
    kept = []
    for room in (30_000, 6_000, 4_000):
        source = build(scores, largest=around + room)
        assert len(source.encode()) <= around + room
        page = Page(source)
        columns = {column["method"] for column in page.facts["columns"]}
        kept.append((len(columns), sum(page.text(f"text-{n}") != "" for n in range(3))))
        # What is compared first is always there.
        assert set(page.facts["modes"][0]["best"]) <= columns
    assert kept[0] == (6, 3)
    assert 3 <= kept[1][0] < 6
    assert kept[2][1] < 3
