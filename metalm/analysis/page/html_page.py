"""The report as one page that opens offline: tables, interactive curves, articles word by word.

The page's markup, style and scripts lie in page/; this file fills them in. Everything untrusted is
either escaped HTML, JSON in which no markup can begin, or inside of a packed block that the scripts
only ever put into text nodes. The policy in the page allows exactly the style and the scripts that
are in it (by their SHA-256), and no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template

from metalm.analysis.figures.appearance import Look, looks
from metalm.analysis.figures.figure_parts import DASHES, symbol
from metalm.analysis.figures.interactive_plots import charts
from metalm.analysis.page.html_tables import cost_table, folded, tables
from metalm.analysis.page.word_columns import (
    Arranged,
    arrange,
    deflated,
    first_compared,
    fits,
    pack,
)
from metalm.analysis.plain_text import shown
from metalm.analysis.statistics.featured import featured
from metalm.analysis.statistics.results import Results, as_json
from metalm.analysis.statistics.tempered import Tempered
from metalm.analysis.statistics.traces import Trace
from metalm.analysis.tables import Cost, tempered_grid

# Bytes; words and losses are rounded, and in the end left out, to stay below.
LARGEST_PAGE = 7_900_000
LONGEST_TITLE = 120
# How many methods of a mode keep the losses of words where there is no room for those of all.
FEWER_METHODS = (8, 5, 3)
STYLE = "report.css"
# Plotly.js with lines and bars only, a quarter of what the Python package carries.
PLOTLY = "plotly-basic.min.js"
SCRIPTS = ("unpack.js", "figures.js", "words.js", "report.js")


def build_page(
    results: Mapping[str, Results],
    *,
    title: str,
    configuration: Mapping[str, object],
    cost: Mapping[str, Cost],
    command: str,
    traces: Mapping[str, Sequence[Trace]] | None = None,
    tempered: Mapping[str, Tempered] | None = None,
    notes: Sequence[str] = (),
    largest: int = LARGEST_PAGE,
) -> str:
    """The page as text.

    Args:
        results: reading mode -> what was computed about it.
        title: of the page.
        configuration: the resolved configuration.
        cost: reading mode -> method -> what it cost; may be empty.
        command: the command line that gave these results.
        traces: reading mode -> what was recorded while reading.
        tempered: reading mode -> the methods once more, under temperatures of their own.
        notes: what has to be said before the tables, a paragraph each.
        largest: bytes that the page may have; words are rounded or left out to get there. The rest,
            about a million bytes, is always there.
    """
    scores = [of_mode.scores for of_mode in results.values()]
    drawn, first = looks(scores), featured(scores)
    figures = {
        mode: [
            chart._asdict() for chart in charts(of_mode, drawn, (traces or {}).get(mode, ()), first)
        ]
        for mode, of_mode in results.items()
    }
    script, style, plotly = _script(), _read(STYLE), _read(PLOTLY)
    parts = {
        "policy": _policy([script, plotly], [style]),
        "title": _escaped(shown(title, LONGEST_TITLE)),
        "notes": "\n".join(f'<p class="note">{_escaped(note)}</p>' for note in notes),
        "style": style,
        "command": _escaped(_lines(command)),
        "tables": "\n".join(
            _of_mode(number, mode, of_mode, cost.get(mode, {}), (tempered or {}).get(mode))
            for number, (mode, of_mode) in enumerate(results.items())
        ),
        "configuration": _escaped(json.dumps(as_json(configuration), indent=2)),
        "guards": _style_guards(plotly),
        "figures": deflated(json.dumps(figures, allow_nan=False).encode()),
        "plotly": _packed_plotly(),
        "script": script,
    }
    facts, step, blocks = _words(results, drawn, largest - _size(parts))
    return Template(_read("report.html")).substitute(parts, facts=facts, step=step, blocks=blocks)


def _size(parts: Mapping[str, str]) -> int:
    return sum(len(part.encode()) for part in [*parts.values(), _read("report.html")])


def _words(
    results: Mapping[str, Results], drawn: Mapping[str, Look], room: int
) -> tuple[str, float, str]:
    """Facts, step and blocks: of all methods if there is room for them, else of fewer."""
    scores = {mode: of_mode.scores for mode, of_mode in results.items()}
    for most in (None, *FEWER_METHODS):
        arranged = arrange(scores, most)
        facts = in_script(_facts(results, arranged, drawn))
        around = len(_data_block("text-", "")) + len(str(len(arranged.texts)))
        left = room - len(facts) - around * (len(arranged.texts) + 1)
        if most == FEWER_METHODS[-1] or fits(arranged, left):
            break
    packed = pack(arranged, left)
    blocks = [_data_block("vocabulary", packed.vocabulary)]
    blocks += [_data_block(f"text-{n}", block) for n, block in enumerate(packed.blocks)]
    return facts, packed.step, "".join(blocks)


def _facts(results: Mapping[str, Results], arranged: Arranged, drawn: Mapping[str, Look]) -> object:
    """What the scripts need to know before they unpack anything."""
    first = featured([of_mode.scores for of_mode in results.values()])
    return {
        "columns": [column._asdict() for column in arranged.columns],
        "texts": [
            {"words": text.article.num_words, "columns": sorted(text.losses)}
            for text in arranged.texts
        ],
        "modes": [
            {
                "name": shown(mode),
                "key": mode,
                "methods": [shown(method) for method in of_mode.scores.methods],
                "keys": list(of_mode.scores.methods),
                "looks": [_look(drawn[method]) for method in of_mode.scores.methods],
                "first": [method in first for method in of_mode.scores.methods],
                "best": first_compared(of_mode.scores),
                "articles": [
                    {
                        "title": shown(article.title, 80),
                        "text": place,
                        "nats": [
                            round(float(article.losses[method].sum()), 2)
                            for method in of_mode.scores.methods
                        ],
                    }
                    for article, place in zip(
                        of_mode.scores.articles, arranged.places[mode], strict=True
                    )
                ],
            }
            for mode, of_mode in results.items()
        ],
    }


def _look(look: Look) -> dict[str, str]:
    return {"colour": look.colour, "dash": DASHES[look.dashes], "symbol": symbol(look)}


def _of_mode(
    number: int, mode: str, results: Results, cost: Cost, tempered: Tempered | None
) -> str:
    """The tables of one reading mode; the page shows one mode at a time."""
    more = cost_table(cost, mode) if cost else ""
    if tempered is not None:
        more = folded(tempered_grid(tempered, results.scores, mode)) + more
    return (
        f'<section class="mode" data-mode="{number}">\n'
        f"<h2>Reading mode: {_escaped(shown(mode))}</h2>\n"
        f"{tables(results, mode)}{more}</section>"
    )


def in_script(value: object) -> str:
    r"""JSON that can stand inside of a script element: no markup begins in it, no line breaks.

    Example:
        >>> in_script("</script>")
        '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _data_block(name: str, content: str) -> str:
    return f'<script type="application/octet-stream" id="{name}">{content}</script>'


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Content-Security-Policy: these scripts and styles, pictures that the page makes, no request.

    The empty style is what plotly makes to put rules into; it also sets attributes named style.
    """
    allowed = " ".join(_hash_source(script) for script in scripts)
    styled = " ".join(_hash_source(style) for style in [*styles, ""])
    return (
        f"default-src 'none'; script-src {allowed}; style-src-elem {styled}; "
        "style-src-attr 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _hash_source(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _style_guards(plotly: str) -> str:
    """Elements that keep the library from adding styles (of maps) that the policy would block.

    It adds none where an element with the style's own identifier is there already.
    """
    found = dict.fromkeys(re.findall(r'getElementById\("([0-9a-f]{64})"\)', plotly))
    return "".join(f'<meta id="{identifier}">' for identifier in found)


def _script() -> str:
    """All of the page's own scripts as one, in a scope of their own."""
    return "(() => {\n" + "\n".join(_read(name) for name in SCRIPTS) + "})();\n"


@cache
def _packed_plotly() -> str:
    return deflated(_read(PLOTLY).encode())


def _read(name: str) -> str:
    return (resources.files("metalm.analysis.page") / name).read_text(encoding="utf-8")


def _lines(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _escaped(text: str) -> str:
    return html.escape(text)
