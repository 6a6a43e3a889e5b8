import sys

import pytest

from data_prep.python_docs import (
    docstrings,
    plain_text,
    python_docs_source,
    read_articles,
    without_repeats,
)
from data_prep.text_source import TextArticle, count

MODULE = '''"""Module's first line.

Second paragraph, wrapped
over lines.
"""

raise RuntimeError("never imported")

class Thing:
    """A thing."""

    def method(self):
        """Do it."""
        def inner():
            "Inside."

async def function():
    """Last."""

def without():
    x = "no docstring"
'''


def test_docstrings_in_order_without_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    found = docstrings(path)
    assert found[1:] == ["A thing.", "Do it.", "Inside.", "Last."]
    assert found[0].startswith("Module's first line.\n\nSecond")


@pytest.mark.parametrize("content", [b"def (:\n", b"'\xff'\n", b"# coding: nonsense\n", b""])
def test_files_that_cannot_be_parsed_have_no_docstrings(tmp_path, content):
    (tmp_path / "bad.py").write_bytes(content)
    assert docstrings(tmp_path / "bad.py") == []


def test_plain_text_by_hand():
    text = "Heading\n*******\n\nDon't call f(x_1), it's\nold.\n\n\n----\n\n   >>> 1 + 1\n"
    assert plain_text(text) == "Heading\nDon't call f ( x_1 ) , it's old .\n> > > 1 + 1\n"
    assert plain_text("\n***\n") == ""


def test_repeated_lines_are_left_out_of_later_articles():
    long, short = "one two three four five six seven eight\n", "Example :\n"
    articles = [TextArticle("a", long + short + long), TextArticle("b", short + long + "new\n")]
    assert list(without_repeats(articles)) == [articles[0], TextArticle("b", short + "new\n")]


def test_modules_become_articles(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "test").mkdir()
    for name in ("package/__init__", "package/part", "test/left_out", "zero"):
        (tmp_path / f"{name}.py").write_text(f'"""About {name} ."""')
    titles = [article.title for article in read_articles(tmp_path, 1)]
    assert [title for title in titles if title.startswith("module")] == [
        "module package",
        "module package.part",
        "module zero",
    ]
    topics = [title for title in titles if title.startswith("topic")]
    assert topics == sorted(topics)
    assert "topic while" in topics


@pytest.mark.slow
def test_the_documentation_of_this_python():
    source = python_docs_source()
    counts = count(source)
    assert sum(counts.articles.values()) > 150
    texts = {split: set() for split in counts.articles}
    for split in texts:
        for article in source.splits[split]():
            texts[split].update(line for line in article.text.split("\n") if line.count(" ") > 6)
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["valid"]
    if sys.version_info[:2] == (3, 11):
        assert sum(counts.articles.values()) == pytest.approx(220, rel=0.05)
        assert sum(counts.words.values()) == pytest.approx(399_000, rel=0.05)
