import html
import re

import pytest
from markdown_it import MarkdownIt

from metalm.analysis.plain_text import in_markdown, in_plot, shown

HOSTILE = [
    "[red]bold[/red] \x1b[31mred\x07",
    "<script>alert(1)</script> & <b>",
    "a | b | c",
    "*em* _em_ `code` ~~gone~~ \\n",
    "[link](javascript:x) ![i](http://e.x/p.png)",
    "https://example.org me@example.org",
    "$x^2$ and $\\frac$",
    "\u202eright to left\u2066",
    "_hidden_label",
    "日本語 \U0001f600",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_itself_and_nothing_else(text):
    table = f"| a | b |\n|---|---|\n| {in_markdown(text)} | end |\n"
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(table)
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert [html.unescape(cell) for cell in cells] == [shown(text), "end"]
    assert "<" not in cells[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_shown_text_is_one_printable_line(text):
    result = shown(text)
    assert all(c.isprintable() for c in result)
    assert shown(result) == result


def test_long_text_is_cut_with_an_ellipsis():
    assert shown("x" * 61) == "x" * 59 + "…"
    assert shown("x" * 60) == "x" * 60


def test_plots_draw_dollars_and_missing_glyphs_plainly():
    assert in_plot("$5 and $6") == r"\$5 and \$6"
    assert in_plot("日本 é") == "?? é"
    assert not in_plot("_hidden").startswith("_")
