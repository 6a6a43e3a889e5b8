"""Untrusted text (titles, words, names) made safe to show in a terminal, Markdown or a plot."""

import unicodedata
from functools import lru_cache

from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

MARKDOWN_SIGNS = "\\`*_[]~$"
MARKDOWN_ENTITIES = "<>&|@"


def shown(text: str, limit: int = 60) -> str:
    r"""Text on one line, without control or direction signs, cut to `limit` characters.

    Args:
        text: any text.
        limit: longest result, in characters; a longer text ends in an ellipsis.

    Example:
        >>> shown("two\nlines\x1b[31m")
        'two lines\ufffd[31m'
    """
    one_line = " ".join(text[: 8 * limit].split())
    clean = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in one_line)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def in_markdown(text: str, limit: int = 60) -> str:
    r"""Text inside of a Markdown line or table cell: signs that mean something there are escaped.

    Example:
        >>> in_markdown("*a* | <b>")
        '\\*a\\* &#124; &#60;b&#62;'
    """
    escaped = "".join(
        f"&#{ord(c)};" if c in MARKDOWN_ENTITIES else f"\\{c}" if c in MARKDOWN_SIGNS else c
        for c in shown(text, limit)
    )
    return escaped.replace("://", ":&#47;/")


def in_plot(text: str, limit: int = 60) -> str:
    """Text that the plot font can draw, without mathematics; other characters become "?"."""
    drawn = "".join(c if ord(c) in _drawable() else "?" for c in shown(text, limit))
    # Matplotlib keeps labels that begin with an underscore out of legends.
    return (" " + drawn if drawn.startswith("_") else drawn).replace("$", r"\$")


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    font = FT2Font(findfont(FontProperties(family="DejaVu Sans")))
    return frozenset(font.get_charmap())
