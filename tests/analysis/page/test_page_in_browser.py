"""The page in a real browser without a window; run with -m browser.

The page's policy forbids evaluating text as a script, so these tests wait for elements, not for
expressions.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from metalm.analysis import ArticleScores, Scores, Trace
from metalm.analysis.page.html_page import LARGEST_PAGE, build_page
from metalm.analysis.statistics.results import compute
from metalm.analysis.statistics.traces import DISTANCE

pytestmark = pytest.mark.browser
api = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120_000  # milliseconds; a busy machine may take long
MARKUP = "<img src=x onerror=document.title='hit'><script>document.title='hit'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser; expected one of {', '.join(NAMES)} on the path")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


class Watched:
    """A page that was opened, with what it said and asked for."""

    def __init__(self, browser, path: Path, **context) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(
            **{"viewport": {"width": 1400, "height": 900}, **context}
        )
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.session = self.context.new_cdp_session(self.page)
        self.session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.address = path.as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def seconds_of_work(self) -> float:
        """Of the page's own thread, which other programs lengthen less than the clock."""
        found = self.session.send("Performance.getMetrics")["metrics"]
        return next(item["value"] for item in found if item["name"] == "TaskDuration")

    def draw_all(self) -> None:
        for frame in self.page.query_selector_all("#figures .plot"):
            frame.scroll_into_view_if_needed()
            self.page.wait_for_selector(f"#{frame.get_attribute('id')} .main-svg", state="attached")

    def check_quiet(self) -> None:
        assert self.said == []
        assert self.asked == [self.address]

    def chosen(self, identifier: str) -> str:
        return self.page.eval_on_selector(f"#{identifier}", "s => s.selectedOptions[0].textContent")


@pytest.fixture(scope="module")
def scores() -> dict[str, Scores]:
    """Two modes with their own losses; exact tenths, so that what is shown can be foretold."""
    modes = {}
    for mode, seed in (("reset", 1), ("carry", 2)):
        random = np.random.default_rng(seed)
        articles = []
        for number, length in enumerate((700, 320, 410)):
            words = [f"w{i}" for i in random.integers(0, 90, length)]
            words[9::25] = ["\n"] * len(words[9::25])
            words[0] = MARKUP if number == 1 else words[0]
            losses = {
                method: random.integers(1, 80, length) / 10
                for method in ("static", "cache", "metalm", "metalm + cache")
            }
            title = MARKUP if number == 1 else f"article {number}"
            articles.append(ArticleScores(title=title, words=words, losses=losses))
        modes[mode] = Scores(methods=tuple(losses), articles=tuple(articles))
    # Both modes read the same words.
    carried = [
        ArticleScores(title=a.title, words=a.words, losses=b.losses)
        for a, b in zip(modes["reset"].articles, modes["carry"].articles, strict=True)
    ]
    modes["carry"] = Scores(methods=modes["carry"].methods, articles=tuple(carried))
    return modes


@pytest.fixture(scope="module")
def page_file(scores, tmp_path_factory) -> Path:
    trace = Trace(
        method="metalm",
        quantity=DISTANCE,
        name=MARKUP,
        words=[np.arange(1.0, 300, 50)] * 3,
        values=[np.arange(6) / 10] * 3,
    )
    content = build_page(
        {mode: compute(of_mode) for mode, of_mode in scores.items()},
        title=MARKUP,
        configuration={"a": MARKUP},
        cost={},
        command=MARKUP,
        traces={"reset": [trace]},
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, page_file) -> Iterator[Watched]:
    watched = Watched(browser, page_file)
    yield watched
    watched.context.close()


def test_everything_is_there_and_nothing_is_asked_for(opened):
    page = opened.page
    assert page.locator("section.mode:visible").count() == 1
    assert page.locator("#results table:visible").count() == 1
    assert page.locator("#text .w").count() == 700
    assert page.locator("#course .main-svg").count() > 0
    assert page.locator("#scale .w").count() == 11
    opened.draw_all()
    names = {frame.get_attribute("id") for frame in page.query_selector_all("#figures .plot")}
    assert names >= {
        "gain_by_position",
        "perplexity_by_position",
        "gain_along_articles",
        "gain_by_article",
        "gain_seen_and_new",
        "recorded_distance",
    }
    assert page.locator("#failure:visible").count() == 0
    opened.check_quiet()


def test_words_are_coloured_by_the_change_and_show_their_figures(opened, scores):
    page, article = opened.page, scores["reset"].articles[0]
    page.select_option("#method", label="metalm")
    page.select_option("#against", label="cache")
    saved = np.round(article.losses["cache"] - article.losses["metalm"], 6)
    shown = page.eval_on_selector_all(
        "#text .w", "all => all.map(s => [s.textContent, s.className])"
    )
    for (text, look), word, change in zip(shown, article.words, saved, strict=True):
        assert text == ("⏎" if word == "\n" else word)
        level = sum(abs(change) >= edge - 1e-9 for edge in (0.1, 0.3, 0.7, 1.5, 3))
        wanted = "" if level == 0 else f"{'b' if change > 0 else 'r'}{level}"
        assert look.split() == [
            "w",
            *(["end"] if word == "\n" else []),
            *([wanted] if wanted else []),
        ]
    place = int(np.argmax(saved))
    page.locator("#text .w").nth(place).hover()
    tip = page.inner_text("#figure")
    assert article.words[place] in tip
    assert f"word {place + 1} of 700" in tip
    assert f"better by {saved[place]:.2f} nats" in tip
    rows = {row.split("\t")[0]: row.split("\t")[1] for row in tip.splitlines() if "\t" in row}
    assert rows == {method: f"{article.losses[method][place]:.2f}" for method in article.losses}
    page.mouse.move(2, 2)
    assert page.locator("#figure:visible").count() == 0
    opened.check_quiet()


def test_the_arrow_keys_walk_from_word_to_word(opened, scores):
    page, words = opened.page, scores["reset"].articles[0].words
    page.focus("#text")
    for word in words[:3]:
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#figure .head:text-is({word!r})")
    page.keyboard.press("Escape")
    page.wait_for_selector("#figure", state="hidden")


def test_articles_methods_and_modes_are_picked(opened, scores):
    page = opened.page
    page.click("#next")
    api.expect(page.locator("#text .w")).to_have_count(320, timeout=PATIENCE)
    page.select_option("#method", label="metalm + cache")
    page.select_option("#against", label="static")

    def told(mode):
        article = scores[mode].articles[1]
        return [f"{np.exp(article.losses[m].mean()):#.4g}" for m in ("metalm + cache", "static")]

    def shown():
        return page.locator("#tally b").all_inner_texts()[:2]

    assert shown() == told("reset")
    page.click("#modes input >> nth=1")
    page.wait_for_selector("section.mode[data-mode='1']:visible")
    assert page.locator("section.mode:visible").count() == 1
    page.wait_for_selector(f"#tally b:text-is('{told('carry')[0]}')")
    # Article and methods stay as they were chosen.
    assert shown() == told("carry")
    assert MARKUP[:30] in opened.chosen("article")
    assert opened.chosen("method") == "metalm + cache"
    page.click("#previous")
    api.expect(page.locator("#text .w")).to_have_count(700, timeout=PATIENCE)
    opened.check_quiet()


def test_the_curves_show_figures_and_leave_methods_out(opened):
    page = opened.page
    opened.draw_all()
    plot = page.locator("#gain_by_position")
    plot.scroll_into_view_if_needed()
    lines = plot.locator(".scatterlayer .trace")
    assert lines.count() == 3
    plot.locator(".scatterlayer .trace >> nth=0").locator(".point >> nth=0").hover(force=True)
    page.wait_for_selector("#gain_by_position .hoverlayer text", state="attached")
    assert "no interval: too few articles" in plot.locator(".hoverlayer").text_content()
    page.locator("#methods label", has_text="metalm + cache").locator("input").uncheck()
    api.expect(lines).to_have_count(2, timeout=PATIENCE)
    opened.check_quiet()


def test_of_many_methods_some_are_unticked_and_can_be_ticked(browser, tmp_path):
    random = np.random.default_rng(5)
    # The worst of the rivals and the worst of ours are those that come last.
    names = [f"{side} {n}" for side in ("rival", "metalm") for n in range(3)]
    losses = {name: random.random(300) + int(name[-1]) for name in names}
    losses["static"] = random.random(300) + 9
    article = ArticleScores(title="A", words=["w"] * 300, losses=losses)
    scores = Scores(methods=tuple(losses), articles=(article, article))
    path = tmp_path / "many.html"
    content = build_page(
        {"reset": compute(scores)}, title="t", configuration={}, cost={}, command="c"
    )
    path.write_text(content, encoding="utf-8")
    opened = Watched(browser, path)
    page = opened.page
    ticked = page.eval_on_selector_all(
        "#methods label",
        "all => all.filter(l => l.firstElementChild.checked).map(l => l.textContent)",
    )
    assert ticked == [*(name for name in names if name[-1] != "2"), "static"]
    assert page.locator("#fewer:visible").count() == 1
    opened.draw_all()
    lines = page.locator("#gain_by_position .scatterlayer .trace")
    assert lines.count() == 4
    page.locator("#methods label", has_text="rival 2").locator("input").check()
    api.expect(lines).to_have_count(5, timeout=PATIENCE)
    opened.check_quiet()
    opened.context.close()


def test_a_mark_of_an_article_opens_it(opened):
    page = opened.page
    opened.draw_all()
    plot = page.locator("#gain_by_article")
    plot.scroll_into_view_if_needed()
    # The second mark of a line is that of the second article.
    point = plot.locator(".scatterlayer .trace >> nth=0").locator(".point >> nth=1")
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2)
    page.wait_for_selector("#gain_by_article .hoverlayer text", state="attached")
    page.mouse.down()
    page.mouse.up()
    api.expect(page.locator("#text .w")).to_have_count(320, timeout=PATIENCE)


def test_markup_in_texts_stays_text(opened):
    page = opened.page
    page.click("#next")
    api.expect(page.locator("#text .w")).to_have_count(320, timeout=PATIENCE)
    assert page.locator("#text .w >> nth=0").text_content() == MARKUP
    opened.draw_all()
    page.locator("#text .w >> nth=0").hover()
    assert MARKUP in page.inner_text("#figure")
    assert page.locator("img").count() == 0
    assert page.locator("main script").count() == 0
    assert page.title().startswith("<img")
    opened.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_fits_its_window_in_either_scheme(browser, page_file, width, scheme):
    size = {"width": width, "height": 844}
    opened = Watched(browser, page_file, viewport=size, color_scheme=scheme)
    opened.draw_all()
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    light = [sum(map(int, text[4:-1].split(","))) for text in (ground, ink)]
    assert (light[0] > light[1]) == (scheme == "light")
    # Every colour of the legend lets its text be read: a contrast of at least 4.5 (WCAG 2, AA).
    for colours in page.eval_on_selector_all(
        "#scale .w[class*=' ']",
        "all => all.map(s => [getComputedStyle(s).backgroundColor, getComputedStyle(s).color])",
    ):
        assert contrast(*colours) >= 4.5
    opened.check_quiet()
    opened.context.close()


def contrast(*colours: str) -> float:
    """Ratio of the relative luminances of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        values = np.array([int(part) for part in colour[4:-1].split(",")]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_sixty_articles_of_14000_words_are_small_and_open_fast(browser, tmp_path):
    random = np.random.default_rng(4)
    vocabulary = np.array([f"word{number}" for number in range(30_000)])
    methods = (
        "static",
        "cache",
        "sgd",
        "sgd + cache",
        "rms",
        "rms + cache",
        "metalm",
        "metalm + cache",
    )
    articles = []
    for number in range(60):
        words = vocabulary[np.minimum(random.zipf(1.2, 14_000), 30_000) - 1].tolist()
        words[60::90] = ["\n"] * len(words[60::90])
        static = random.gamma(1.6, 2.6, 14_000)
        losses = {m: np.abs(static + random.laplace(-0.1, 0.4, 14_000)) for m in methods[1:]}
        losses["static"] = static
        articles.append(ArticleScores(title=f"article {number}", words=words, losses=losses))
    results = {"reset": compute(Scores(methods=methods, articles=tuple(articles)))}
    content = build_page(results, title="t", configuration={}, cost={}, command="c").encode()
    assert len(content) <= LARGEST_PAGE < 8_000_000
    path = tmp_path / "large.html"
    path.write_bytes(content)
    opened = Watched(browser, path)
    assert opened.page.locator("#text .w").count() == 14_000
    assert opened.page.locator("#article option:enabled").count() == 60
    assert opened.page.locator("#method option").count() == len(methods)
    assert opened.seconds_of_work() < 2
    best = min(methods[6:], key=results["reset"].scores.perplexity)
    articles_perplexity = np.exp(articles[1].losses[best].mean())
    before = opened.seconds_of_work()
    opened.page.click("#next")
    opened.page.wait_for_selector(f"#tally b:text-is('{articles_perplexity:#.4g}')")
    assert opened.seconds_of_work() - before < 1.5
    opened.check_quiet()
    opened.context.close()
