"""Ordinary text in the form of WikiText, which a model that was trained there knows.

WikiText (Merity et al. 2016) was cut into words by the rules of the Moses tokenizer: punctuation
stands apart (``lobster , known as``), marks inside numbers and compounds are written ``@,@``,
``@.@`` and ``@-@``, and each paragraph is one line. To a model that never saw ``lobster,`` ordinary
text is a foreign language, and what it seems to learn there is where commas stick.
"""

from __future__ import annotations

import re

_STRAIGHT = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "…": "..."})

# What stands apart wherever it is; runs of dots, and the sign for an unknown word, stay whole.
_ALWAYS = re.compile(r'(\.{2,}|<unk>|[,;:!?()\[\]{}"/$£€%°=&*+<>|~–—−])')
_IN_NUMBERS = re.compile(r"(?<=\d)([,.])(?=\d)")
_IN_COMPOUNDS = re.compile(r"(?<=\w)-(?=\w)")
_SHORTENED = re.compile(r"(?<=\w)'(?=\w)")
_QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")
_LAST_DOT = re.compile(r"^(.*[^.])\.$")

# Words that keep their dot inside a paragraph, beside initials such as J. and U.S.
_ABBREVIATION = re.compile(
    "Mr|Mrs|Ms|Dr|Prof|Rev|St|Mt|Ft|Sr|Jr|Bros|Co|Corp|Inc|Ltd|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Hon|"
    "Nos?|vs|var|etc|Vol|pp|ca|cf|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec"
)
_INITIALS = re.compile(r"^(?:[^\W\d_]\.)*[^\W\d_]$")

_APART = re.compile(r" [,.](?=\s)")
_ATTACHED = re.compile(r"\w[,.](?=\s|$)")


def is_in_wikitext_form(text: str) -> bool:
    """Whether commas and full stops stand apart more often than not."""
    return len(_APART.findall(text)) > len(_ATTACHED.findall(text))


def in_wikitext_form(text: str) -> str:
    """The text with punctuation apart, a line a paragraph; as it is if it is so already.

    Args:
        text: where blank lines separate paragraphs, lines between them are taken for wrapped ones
            and joined; without any, every line is a paragraph.
    """
    if is_in_wikitext_form(text):
        return text
    return "".join(f"{_apart(paragraph)}\n" for paragraph in _paragraphs(text))


def _paragraphs(text: str) -> list[str]:
    lines = text.strip().splitlines()
    if all(line.strip() for line in lines):
        return lines
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(lines))]


def _apart(paragraph: str) -> str:
    paragraph = paragraph.translate(_STRAIGHT)
    # These marks hold no comma, dot or hyphen that the next steps would find.
    paragraph = _IN_NUMBERS.sub(lambda mark: " \0c\0 " if mark[1] == "," else " \0d\0 ", paragraph)
    paragraph = _IN_COMPOUNDS.sub(" \0h\0 ", paragraph)
    paragraph = _ALWAYS.sub(r" \1 ", paragraph)
    paragraph = _QUOTE.sub(" ' ", paragraph)
    paragraph = _SHORTENED.sub(" '", paragraph)
    words = paragraph.split()
    ends = [_ends_sentence(words, place) for place in range(len(words))]
    found = [f"{word[:-1]} ." if end else word for word, end in zip(words, ends, strict=True)]
    marks = {"\0c\0": "@,@", "\0d\0": "@.@", "\0h\0": "@-@"}
    return " ".join(marks.get(word, word) for word in found)


def _ends_sentence(words: list[str], place: int) -> bool:
    """Whether a word ends in a dot that is none of its own."""
    match = _LAST_DOT.match(words[place])
    if match is None:
        return False
    after = words[place + 1 :]
    if not any(any(map(str.isalnum, word)) for word in after):  # the paragraph's last word
        return True
    return not (_ABBREVIATION.fullmatch(match[1]) or _INITIALS.match(match[1]))
