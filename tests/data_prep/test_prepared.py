import os
from functools import partial

import pytest

from data_prep import prepared
from data_prep.prepared import write
from data_prep.text_source import TextArticle, TextSource, count
from metalm.language.text.articles import open_corpus
from metalm.training.disk import file_checksum

TEXTS = {
    "train": ["a b a\n\nc\n", "one a\n", "c b\nb\n", "x\n", "one\n"],
    "valid": ["b new\n", "d\n"],
    "test": ["c c\n", "a\n", "y x\n"],
}


def source(texts=TEXTS, **changes):
    articles = {
        split: [TextArticle(f"{split} {n}", text) for n, text in enumerate(rows)]
        for split, rows in texts.items()
    }
    splits = {split: partial(iter, rows) for split, rows in articles.items()}
    return TextSource(**{"name": "tiny", "identity": {}, "splits": splits} | changes)


def checksums(folder):
    files = open_corpus(folder).manifest["files"]
    # `datasets` derives the fingerprint in state.json from the place of the files.
    return {name: files[name]["sha256"] for name in files if not name.endswith("state.json")}


def test_counts_by_hand():
    counts = count(source())
    assert counts.articles == {"train": 5, "valid": 2, "test": 3}
    assert counts.words == {"train": 19, "valid": 5, "test": 8}
    assert counts.vocabulary == len({"a", "b", "c", "one", "x", "new", "d", "y", "\n"})


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_an_empty_article_is_named(text):
    with pytest.raises(ValueError, match=r"expected at least one word in 'valid 1' \(valid\)"):
        count(source(TEXTS | {"valid": ["b\n", text]}))


def test_an_empty_split_is_named():
    with pytest.raises(ValueError, match="tiny has no articles in its test split"):
        count(source(TEXTS | {"test": []}))


def test_a_refused_text_is_not_written(tmp_path):
    def refuse(counts):
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        write(source(check=refuse), tmp_path / "tiny", "word", 0)
    assert not (tmp_path / "tiny").exists()


def test_open_words_are_those_met_twice_in_training(tmp_path):
    write(source(), tmp_path / "tiny", "word", 0)
    corpus = open_corpus(tmp_path / "tiny")
    texts = {corpus.vocabulary.token_text(token) for token in range(corpus.vocabulary.size)}
    assert texts == {"\n", "a", "b", "c", "one", "<unk>"}
    found = [corpus.vocabulary.token_text(int(token)) for token in corpus.valid[0].tokens]
    assert found == ["b", "<unk>", "\n"]


def test_closed_words_are_those_of_all_splits(tmp_path):
    write(source(closed=True), tmp_path / "tiny", "word", 0)
    assert open_corpus(tmp_path / "tiny").vocabulary.size == count(source()).vocabulary


def test_byte_pairs_are_learnt_on_the_training_split_only(tmp_path):
    write(source(), tmp_path / "one", "bpe", 262)
    write(source(TEXTS | {"test": ["zz zz zz zz zz\n"]}), tmp_path / "two", "bpe", 262)
    one, two = (open_corpus(tmp_path / name).vocabulary for name in ("one", "two"))
    assert one.checksum == two.checksum


def test_the_size_of_batches_does_not_matter(tmp_path, monkeypatch):
    write(source(), tmp_path / "one", "bpe", 262)
    monkeypatch.setattr(prepared, "BATCH_CHARACTERS", 9)
    write(source(), tmp_path / "several", "bpe", 262)
    one, several = (open_corpus(tmp_path / name) for name in ("one", "several"))
    for split in TEXTS:
        pairs = zip(getattr(one, split), getattr(several, split), strict=True)
        for left, right in pairs:
            assert left[:2] == right[:2]
            assert left.tokens.tolist() == right.tokens.tolist()
            assert left.words.tolist() == right.words.tolist()


def test_an_interrupted_preparation_is_unfinished_and_is_redone(tmp_path):
    def interrupted():
        yield TextArticle("test 0", "c c\n")
        if reads:
            reads.pop()
            return
        raise KeyboardInterrupt

    reads = [1]  # the first reading counts, the second writes
    splits = source().splits | {"test": interrupted}
    folder = tmp_path / "tiny"
    with pytest.raises(KeyboardInterrupt):
        write(source(splits=splits), folder, "bpe", 262)
    assert (folder / "train").is_dir()
    with pytest.raises(ValueError, match="did not finish"):
        open_corpus(folder)
    (folder / "train" / "left.arrow").write_text("half")
    (folder / "notes.txt").write_text("not ours")
    write(source(), folder, "bpe", 262)
    write(source(), tmp_path / "fresh", "bpe", 262)
    assert checksums(folder) == checksums(tmp_path / "fresh")
    assert (folder / "notes.txt").read_text() == "not ours"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "notes.txt",
        "test",
        "train",
        "valid",
        "vocabulary",
    ]


def test_the_manifest_has_the_checksum_of_every_file(tmp_path):
    manifest = write(source(), tmp_path / "tiny", "word", 0)
    paths = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    found = {path.relative_to(tmp_path / "tiny").as_posix(): path for path in paths}
    del found["manifest.json"]
    assert set(manifest["files"]) == set(found)
    for name, path in found.items():
        assert manifest["files"][name]["sha256"] == file_checksum(path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = r"file.* cannot be written; expected a folder to .*--out"
    for folder in (tmp_path / "file", tmp_path / "file" / "tiny"):
        with pytest.raises(ValueError, match=message):
            write(source(), folder, "word", 0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        write(source(), tmp_path / "tiny", "word", 0)
