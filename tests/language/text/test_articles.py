import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.prepared import write
from data_prep.text_source import TextArticle, TextSource
from metalm.language.text.articles import (
    SCHEMA,
    Article,
    ArticleSet,
    check_tokens,
    open_corpus,
    read_manifest,
)
from metalm.language.text.vocabulary import split_words

TEXTS = {
    "train": ["a b\n\nc\n", "one\n", "a a a b\nd\n", "x y z\n", "the last one\n"],
    "valid": ["b a\n", "d\n"],
    "test": ["c c\n", "a\n", "y x\n"],
}


def source():
    articles = {
        split: [TextArticle(f"{split} {n}", text) for n, text in enumerate(texts)]
        for split, texts in TEXTS.items()
    }
    return TextSource(
        name="tiny",
        identity={"checksum": "none"},
        splits={split: partial(iter, rows) for split, rows in articles.items()},
        closed=True,
    )


@pytest.fixture(scope="module", params=["word", "bpe"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "tiny"
    write(source(), folder, request.param, 262)
    return folder


@pytest.fixture(scope="module")
def corpus(prepared):
    return open_corpus(prepared)


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "tiny"))


def test_articles_are_what_was_written(corpus):
    for split, texts in TEXTS.items():
        articles = getattr(corpus, split)
        assert [article.text for article in articles] == texts
        assert articles.titles == [f"{split} {n}" for n in range(len(texts))]
        for article, text in zip(articles, texts, strict=True):
            expected = corpus.vocabulary.encode(text)
            assert np.array_equal(article.tokens, expected.tokens)
            assert np.array_equal(article.words, expected.words)
            assert article.tokens.dtype == article.words.dtype == np.int32


def test_counts_equal_a_count_of_the_text(corpus):
    for split, texts in TEXTS.items():
        articles = getattr(corpus, split)
        assert articles.num_words == sum(len(split_words(text)) for text in texts)
        assert articles.word_counts.tolist() == [len(split_words(text)) for text in texts]
        assert articles.lengths.tolist() == [len(article.tokens) for article in articles]
        assert articles.lengths.dtype == np.int64
        assert articles.num_tokens == articles.lengths.sum()


def test_tokens_are_views_of_the_file(corpus):
    article = corpus.train[2]
    again = corpus.train[2]
    assert article.tokens.__array_interface__["data"] == again.tokens.__array_interface__["data"]
    with pytest.raises(ValueError, match="read-only"):
        article.tokens[0] = 1


def test_selections(corpus):
    chosen = corpus.train.select([3, 0, 3])
    assert chosen.titles == ["train 3", "train 0", "train 3"]
    assert chosen.lengths.tolist() == corpus.train.lengths[[3, 0, 3]].tolist()
    assert chosen.select([1])[0].text == TEXTS["train"][0]
    assert corpus.train[1:4].titles == ["train 1", "train 2", "train 3"]
    assert corpus.train[-1].title == "train 4"
    assert len(corpus.train.select([])) == corpus.train.select([]).num_words == 0
    with pytest.raises(IndexError, match="article 5 of 5"):
        corpus.train[5]


def test_an_article_set_of_several_pieces_is_read_across_them():
    rows = [Article("t", "w\n", np.arange(n, dtype=np.int32), np.arange(n)) for n in (2, 5, 3)]
    batches = [
        pa.RecordBatch.from_pylist([row._asdict() | {"num_words": len(row.tokens)}], schema=SCHEMA)
        for row in rows
    ]
    articles = ArticleSet(pa.Table.from_batches(batches))
    assert articles.lengths.tolist() == [2, 5, 3]
    assert [len(article.tokens) for article in articles.select([2, 1])] == [3, 5]
    assert articles[1].tokens.tolist() == [0, 1, 2, 3, 4]


def test_the_manifest_says_what_is_there(corpus):
    assert corpus.name == "tiny"
    assert corpus.manifest["tokenizer"]["size"] == corpus.vocabulary.size
    assert corpus.manifest["splits"]["valid"]["words"] == 5
    corpus.verify()


def test_a_token_beyond_the_vocabulary_is_named(corpus):
    row = {"title": "odd", "text": "a\n", "tokens": [1, 999, -1], "words": [0, 1, 2]}
    table = pa.Table.from_pylist([row | {"num_words": 3}], schema=SCHEMA)
    broken = dataclasses.replace(corpus, test=ArticleSet(table))
    with pytest.raises(ValueError, match=r"article 'odd' \(test\).* found 999 at position 1"):
        broken.verify()
    negative = Article("below", "a\n", np.array([-2], np.int32), np.array([0], np.int32))
    with pytest.raises(ValueError, match=r"expected ids in \[0, 7\), found -2 at position 0"):
        check_tokens(negative, 7)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no prepared corpus; expected a folder, found nothing"):
        open_corpus(tmp_path / "nowhere")


def test_unfinished_preparation(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"did not finish; expected manifest.json.* found none"):
        open_corpus(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '"text"'])
def test_a_damaged_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("changes", [{"format": 2}, {"files": None}])
def test_another_format(folder, changes):
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest = {key: value for key, value in manifest.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is of another format; expected format 1"):
        read_manifest(folder)


def first_arrow_file(folder):
    return next((folder / "train").glob("*.arrow"))


def test_an_altered_file(folder):
    path = first_arrow_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is not what its manifest says.* SHA-256"):
        open_corpus(folder)


def test_a_truncated_file(folder):
    path = first_arrow_file(folder)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"expected {size} bytes, found {size - 7}"):
        open_corpus(folder)


def test_a_missing_file(folder):
    first_arrow_file(folder).unlink()
    with pytest.raises(ValueError, match=r"is missing; expected .*arrow with \d+ bytes"):
        open_corpus(folder)


@pytest.mark.parametrize("what", ["articles", "words", "tokens"])
def test_counts_that_differ_from_the_manifest(folder, what):
    manifest = json.loads((folder / "manifest.json").read_text())
    count = manifest["splits"]["valid"][what]
    manifest["splits"]["valid"][what] = count + 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=f"valid is not .* expected {count + 1} {what}, found {count}"
    ):
        open_corpus(folder)


def test_a_vocabulary_of_another_size(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    size = manifest["tokenizer"]["size"]
    manifest["tokenizer"]["size"] = size + 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"expected {size + 2} entries, found {size}"):
        open_corpus(folder)
