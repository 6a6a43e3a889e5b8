import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep import corpora
from data_prep.__main__ import main
from data_prep.corpora import NAMED, prepare
from data_prep.prepared import write
from data_prep.synthetic import SyntheticText, best_losses, synthetic_source
from metalm.language.text.articles import open_corpus

TINY = SyntheticText(
    num_names=7, cast_size=2, num_lines=3, num_articles={"train": 5, "valid": 2, "test": 4}
)


@pytest.fixture(autouse=True)
def tiny_synthetic(monkeypatch):
    named = {**NAMED, "synthetic": lambda: synthetic_source(TINY)}
    monkeypatch.setattr(corpora, "NAMED", named)


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "my notes"
    folder.mkdir()
    for name in "abcde":
        (folder / f"{name}.txt").write_text(f"text of {name}\n")
    return folder


def modified(folder):
    return (folder / "manifest.json").stat().st_mtime_ns


def test_a_named_corpus(tmp_path):
    folder = prepare("synthetic", tokenizer="word", root=tmp_path / "new" / "data")
    assert folder == tmp_path / "new" / "data" / "synthetic-word"
    corpus = open_corpus(folder)
    assert [len(articles) for articles in (corpus.train, corpus.valid, corpus.test)] == [5, 2, 4]
    article = corpus.test[3]
    assert len(best_losses(article.text, TINY).with_memory) == len(article.tokens)


def test_a_prepared_corpus_is_used_again(tmp_path):
    folder = prepare("synthetic", tokenizer="bpe", vocabulary_size=300, root=tmp_path)
    assert folder.name == "synthetic-bpe300"
    before = modified(folder)
    assert prepare("synthetic", tokenizer="bpe", vocabulary_size=300, root=tmp_path) == folder
    assert modified(folder) == before
    other = prepare("synthetic", tokenizer="bpe", vocabulary_size=301, root=tmp_path)
    assert other.name == "synthetic-bpe301"


def test_a_changed_text_is_prepared_beside_the_old_one(text_folder, tmp_path):
    first = prepare(str(text_folder), tokenizer="word", root=tmp_path / "data")
    assert first.name == "my-notes-word"
    before = modified(first)
    (text_folder / "a.txt").write_text("changed text of a\n")
    second = prepare(str(text_folder), tokenizer="word", root=tmp_path / "data")
    assert second.name.startswith("my-notes-word-")
    assert modified(first) == before
    assert prepare(str(text_folder), tokenizer="word", root=tmp_path / "data") == second
    titles = [open_corpus(folder).train.titles for folder in (first, second)]
    assert titles[0] == titles[1]


@pytest.mark.parametrize("damage", ["manifest", "truncated", "missing"])
def test_a_half_written_folder_is_written_again(tmp_path, damage):
    folder = prepare("synthetic", tokenizer="word", root=tmp_path)
    arrow = next((folder / "train").glob("*.arrow"))
    if damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "truncated":
        arrow.write_bytes(arrow.read_bytes()[:-1])
    else:
        arrow.unlink()
    assert prepare("synthetic", tokenizer="word", root=tmp_path) == folder
    assert len(open_corpus(folder).train) == 5


def test_a_json_lines_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"title": n, "text": f"a {n}"}) for n in range(6)))
    corpus = open_corpus(prepare(str(path), tokenizer="bpe", vocabulary_size=260, root=tmp_path))
    assert corpus.name == "mine"
    assert corpus.train.num_words == 4 * 3


def test_a_prepared_folder_is_its_own_source(tmp_path):
    folder = prepare("synthetic", tokenizer="bpe", vocabulary_size=300, root=tmp_path)
    assert prepare(str(folder), tokenizer="bpe", vocabulary_size=300, root="nowhere") == folder
    with pytest.raises(ValueError, match=r"another tokenizer; expected {'kind': 'word'}, found"):
        prepare(str(folder), tokenizer="word", root=tmp_path)


def test_two_preparations_at_once_write_once(tmp_path, monkeypatch):
    written = []

    def write_slowly(*arguments):
        written.append(arguments)
        time.sleep(0.1)
        return write(*arguments)

    monkeypatch.setattr(corpora, "write", write_slowly)
    with ThreadPoolExecutor(3) as pool:
        tasks = [
            pool.submit(prepare, "synthetic", tokenizer="word", root=tmp_path) for _ in range(3)
        ]
        folders = {task.result() for task in tasks}
    assert folders == {tmp_path / "synthetic-word"}
    assert len(written) == 1


def test_an_unknown_corpus(tmp_path):
    with pytest.raises(ValueError, match=r"expected python-docs, wikitext-2, .* found 'wikitxt'"):
        prepare("wikitxt", tokenizer="word", root=tmp_path)


def test_a_wrong_folder(tmp_path):
    (tmp_path / "notes.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no text in the folder .* expected wiki.train.tokens"):
        prepare(str(tmp_path), tokenizer="word", root=tmp_path)


def test_an_unknown_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="expected one of word, bpe, found 'letters'"):
        prepare("synthetic", tokenizer="letters", root=tmp_path)


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="expected a folder to write into"):
        prepare("synthetic", tokenizer="word", root=tmp_path / "file")


def test_the_program(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--tokenizer", "word"]
    assert main(["synthetic", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "synthetic-word: word vocabulary of" in printed
    assert "train       5 articles           75 words           75 tokens" in printed
    assert main(["nonsense", *arguments]) == 2
    assert "data_prep: unknown corpus; expected python-docs" in capsys.readouterr().err
