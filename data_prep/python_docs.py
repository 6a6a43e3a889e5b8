"""The documentation inside every Python: help topics, and docstrings of the standard library.

Real English text that needs no download. A help topic (`pydoc_data.topics`) is one article; the
docstrings of one module, in the order of its source, are one article. Sources are read with `ast`;
no module is imported.

Words are made comparable with those of running text: a paragraph becomes one line, punctuation is
separated by spaces (an apostrophe inside a word stays), and ruled lines of punctuation are dropped.
So a punctuation mark counts as a word: 220 articles have 399,000 words and ends of line on Python
3.11.7, of which 285,000 would remain if punctuation were left attached.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from data_prep.random_split import split_indices
from data_prep.text_source import TextArticle, TextSource
from metalm.language.text.articles import SPLITS
from metalm.language.text.vocabulary import split_words

# With fewer words there is little to remember; on Python 3.11.7 this leaves 220 articles.
MINIMUM_WORDS = 400
# Shorter lines ("Example :") may well occur in several articles.
REPEAT_WORDS = 8
# With this seed the words, too, are split about 80 / 10 / 10 on Python 3.11.7.
SHUFFLE_SEED = 2

WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
# Installed packages, bundled copies and tests are not documentation of the library.
LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def python_docs_source() -> TextSource:
    """The documentation of the running Python, split 80 / 10 / 10 by a fixed shuffle.

    Another Python version has another text: its number is part of the identity.
    """
    version = platform.python_version()
    return TextSource(
        name=f"python-docs-{version}",
        identity={"from": "this Python", "version": version, "minimum_words": MINIMUM_WORDS},
        splits={split: partial(_split, split) for split in SPLITS},
    )


def read_articles(library: Path, minimum_words: int) -> list[TextArticle]:
    """Help topics in alphabetical order, then modules below `library` in alphabetical order.

    Args:
        library: folder of the standard library.
        minimum_words: shorter articles are left out.
    """
    topics = help_topics()
    found = [TextArticle(f"topic {name}", plain_text(topics[name])) for name in sorted(topics)]
    paths = sorted(library.rglob("*.py"))
    for path in tqdm(paths, desc="reading the standard library", unit="file", disable=None):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.intersection(parts) or any(part.startswith("config-") for part in parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        found.append(TextArticle(f"module {name}", plain_text("\n\n".join(docstrings(path)))))
    distinct = without_repeats(found)
    return [article for article in distinct if len(split_words(article.text)) >= minimum_words]


def without_repeats(articles: Iterable[TextArticle]) -> Iterator[TextArticle]:
    """Leave out lines that an earlier article has; repeats inside one article stay.

    Some topics contain others whole, and pure-Python twins repeat their modules: without this, text
    of the training split would return in the test split.
    """
    seen: set[str] = set()
    for article in articles:
        lines = article.text.splitlines(keepends=True)
        yield TextArticle(article.title, "".join(line for line in lines if line not in seen))
        seen.update(line for line in lines if len(line.split()) >= REPEAT_WORDS)


def help_topics() -> dict[str, str]:
    """Help topics by name; a Python that was installed without them has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def docstrings(path: Path) -> list[str]:
    """Docstrings of a module, its classes and its functions, in the order of the source.

    A file that this Python cannot parse has none.
    """
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return []
    return list(_docstrings_below(tree))


def plain_text(text: str) -> str:
    """One line a paragraph, with punctuation separated from words by spaces."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", text):
        ruled = [line for line in paragraph.split("\n") if re.search(r"\w", line)]
        words = WORD.findall(" ".join(ruled))
        if words:
            lines.append(" ".join(words) + "\n")
    return "".join(lines)


@cache
def _library_articles() -> tuple[TextArticle, ...]:
    return tuple(read_articles(Path(sysconfig.get_path("stdlib")), MINIMUM_WORDS))


def _split(split: str) -> Iterator[TextArticle]:
    articles = _library_articles()
    return (articles[index] for index in split_indices(len(articles), SHUFFLE_SEED)[split])


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings_below(child)
