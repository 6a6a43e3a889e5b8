from pathlib import Path

import pytest
from datasets import Dataset

from data_prep import wikitext
from data_prep.text_source import Counts, count
from data_prep.wikitext import (
    OFFICIAL,
    check_official,
    file_source,
    find_files,
    hub_source,
    split_articles,
)
from metalm.language.text.vocabulary import split_words

OFFICIAL_FILES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "wikitext-2"

LINES = [
    " \n",
    " = First one = \n",
    " \n",
    " It says 1 = 2 . \n",
    " = 12 = \n",
    " in an equation cut into lines . \n",
    " \n",
    " = = Section = = \n",
    " \n",
    " = = = Deeper = = = \n",
    " \n",
    " = below a blank line only = \n",
    " text \n",
    " text \n",
    " = above a blank line only = \n",
    " \n",
    " = = lopsided = \n",
    " \n",
    " = = \n",
    " \n",
    " = E = mc = \n",
    " \n",
    " Text = last \n",
]


def official_files():
    files = find_files(OFFICIAL_FILES) if OFFICIAL_FILES.is_dir() else None
    if files is None:
        pytest.skip(f"the official WikiText-2 files are not in {OFFICIAL_FILES}")
    return files


def write_files(folder, suffix="tokens"):
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.{suffix}").write_text("".join(LINES), encoding="utf-8")
    return folder


def test_only_top_level_headings_between_blank_lines_begin_an_article():
    articles = list(split_articles(LINES))
    assert [article.title for article in articles] == ["First one", "E = mc"]


def test_every_line_is_in_exactly_one_article():
    articles = list(split_articles(LINES))
    assert "".join(article.text for article in articles) == "".join(
        line.strip() + "\n" for line in LINES
    )


def test_lines_as_the_hub_gives_them_make_the_same_text():
    hub = [line if line.strip() else "" for line in LINES]
    assert list(split_articles(hub)) == list(split_articles(LINES))


def test_text_without_a_heading_is_refused(tmp_path):
    assert list(split_articles([])) == []
    with pytest.raises(
        ValueError, match=r"expected headings such as ' = Title = '.* found 2 lines"
    ):
        list(split_articles(["one\n", "two\n"]))


def test_a_file_that_is_not_text_is_named(tmp_path):
    write_files(tmp_path)
    (tmp_path / "wiki.valid.tokens").write_bytes(b" = A = \n\n \xff\n")
    with pytest.raises(ValueError, match=r"wiki.valid.tokens cannot be read as WikiText.*utf-8"):
        count(file_source(tmp_path, find_files(tmp_path)))


def test_a_wrong_copy_is_refused_with_its_counts(tmp_path):
    source = file_source(tmp_path, find_files(write_files(tmp_path)))
    text = "".join(LINES)
    words = len(text.split()) + text.count("\n")
    vocabulary = len({*text.split(), "\n"})
    assert source.closed
    counts = count(source)
    with pytest.raises(
        ValueError,
        match=rf"not the official word-level wikitext-2; expected train 2,088,628 tokens.* "
        rf"found train {words} tokens.*test 2 articles, vocabulary {vocabulary};",
    ):
        source.check(counts)


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_the_published_counts_are_accepted_and_others_are_not(name):
    articles = {"train": 28_475, **OFFICIAL[name].articles}
    published = OFFICIAL[name]._replace(articles=articles)
    check_official(name, published)
    for wrong in (
        published._replace(vocabulary=published.vocabulary + 1),
        published._replace(words=published.words | {"test": 245_570}),
        published._replace(articles=articles | {"valid": 61}),
    ):
        with pytest.raises(ValueError, match=f"not the official word-level {name}"):
            check_official(name, wrong)


def test_the_nearest_published_corpus_is_compared(tmp_path):
    source = file_source(tmp_path, find_files(write_files(tmp_path)))
    words = OFFICIAL["wikitext-103"].words | {"valid": 3}
    counts = Counts({"train": 2, "valid": 60, "test": 60}, words, 267_735)
    with pytest.raises(ValueError, match=r"wikitext-103; expected .* found .* valid 3 tokens"):
        source.check(counts)


def test_raw_files_are_found_and_not_compared(tmp_path):
    source = file_source(tmp_path, find_files(write_files(tmp_path, "raw")))
    assert not source.closed
    source.check(count(source))


def test_an_incomplete_folder(tmp_path):
    assert find_files(tmp_path) is None
    (write_files(tmp_path) / "wiki.test.tokens").unlink()
    with pytest.raises(ValueError, match=r"is incomplete; .* found no wiki.test.tokens"):
        find_files(tmp_path)


def test_the_hub_gives_the_same_articles_as_files(tmp_path, monkeypatch):
    asked = []

    def load(*arguments, split):
        asked.append((*arguments, split))
        rows = [line if line.strip() else "" for line in LINES]
        return Dataset.from_dict({"text": rows})

    monkeypatch.setattr(wikitext, "load_dataset", load)
    source = hub_source("wikitext-2-raw")
    files = file_source(tmp_path, find_files(write_files(tmp_path, "raw")))
    assert asked == []
    assert list(source.splits["valid"]()) == list(files.splits["valid"]())
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    source.check(count(source))
    word_level = hub_source("wikitext-2")
    counts = count(word_level)
    with pytest.raises(ValueError, match="not the official word-level wikitext-2"):
        word_level.check(counts)


def test_a_hub_that_does_not_answer(monkeypatch):
    def load(*arguments, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(wikitext, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"could not be fetched; .* no route; check the connection"
    ):
        list(hub_source("wikitext-103").splits["train"]())


def test_official_validation_and_test_articles():
    source = file_source(OFFICIAL_FILES, official_files())
    for split, words, first in (
        ("valid", 217_646, "Homarus gammarus"),
        ("test", 245_569, "Robert <unk>"),
    ):
        articles = list(source.splits[split]())
        assert len(articles) == 60
        assert articles[0].title == first
        assert sum(len(split_words(article.text)) for article in articles) == words


@pytest.mark.slow
def test_official_counts():
    source = file_source(OFFICIAL_FILES, official_files())
    counts = count(source)
    assert counts.articles == {"train": 600, "valid": 60, "test": 60}
    assert counts.words == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    assert counts.vocabulary == 33_278
    source.check(counts)
