import json

import pytest

from data_prep.own_text import find_text_files, folder_source, json_lines_source
from data_prep.text_source import count


def read(source):
    return {split: list(articles()) for split, articles in source.splits.items()}


def write_folder(folder, num_files=7):
    (folder / "sub").mkdir()
    for number in range(num_files):
        suffix = ".txt" if number % 2 else ".MD"
        (folder / "sub" / f"n{number}{suffix}").write_text(f"\n text {number}\nend\n\n", "utf-8")
    (folder / "ignored.pdf").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")
    return path


def test_each_file_is_one_article_once(tmp_path):
    folder = write_folder(tmp_path)
    splits = read(folder_source(folder, find_text_files(folder)))
    assert [len(splits[split]) for split in ("train", "valid", "test")] == [5, 1, 1]
    articles = sorted(article for split in splits.values() for article in split)
    assert articles == [(f"sub/n{n}", f"text {n}\nend\n") for n in range(7)]
    assert splits["train"] == sorted(splits["train"])


def test_the_identity_follows_the_content(tmp_path):
    folder = write_folder(tmp_path)
    first = folder_source(folder, find_text_files(folder))
    assert folder_source(folder, find_text_files(folder)).identity == first.identity
    (folder / "sub" / "n1.txt").write_text("changed")
    assert folder_source(folder, find_text_files(folder)).identity != first.identity


def test_each_json_line_is_one_article_once(tmp_path):
    rows = [{"title": f"t{n}", "text": f"text {n}\u2028\n\nend"} for n in range(10)]
    del rows[3]["title"]
    splits = read(json_lines_source(write_lines(tmp_path / "mine.jsonl", rows)))
    articles = {article for split in splits.values() for article in split}
    expected = {(row.get("title", "line 4"), row["text"] + "\n") for row in rows}
    assert articles == expected
    assert [len(splits[split]) for split in ("train", "valid", "test")] == [8, 1, 1]


def test_windows_line_ends_and_marks_make_no_words(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbfone two\r\nthree\r\n")
    counts = count(folder_source(tmp_path, find_text_files(tmp_path)))
    assert counts.words == {"train": 5, "valid": 5, "test": 5}
    assert counts.vocabulary == 4


def test_an_article_of_one_word_is_accepted(tmp_path):
    rows = [{"title": "t", "text": "word"}] * 3
    counts = count(json_lines_source(write_lines(tmp_path / "mine.jsonl", rows)))
    assert counts.words == {"train": 2, "valid": 2, "test": 2}


@pytest.mark.parametrize("text", ["", " \n\n\t"])
def test_an_empty_article_is_named(tmp_path, text):
    folder = write_folder(tmp_path)
    (folder / "sub" / "n2.MD").write_text(text)
    with pytest.raises(ValueError, match=rf"empty; .*n2\.MD, found {len(text)} characters"):
        count(folder_source(folder, find_text_files(folder)))
    rows = [{"title": "t", "text": text if n == 4 else "word"} for n in range(6)]
    source = json_lines_source(write_lines(tmp_path / "mine.jsonl", rows))
    with pytest.raises(ValueError, match=r"empty; expected .* in line 5 of .*mine\.jsonl"):
        count(source)


def test_bytes_that_are_not_text_are_named(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "sub" / "n1.txt").write_bytes(b"ab\xe9")
    with pytest.raises(ValueError, match=r"n1.txt is not UTF-8 text; .* byte 0xe9 at position 2"):
        count(folder_source(folder, find_text_files(folder)))
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl is not UTF-8 text"):
        json_lines_source(tmp_path / "mine.jsonl")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = write_folder(tmp_path)
    paths = find_text_files(folder)
    source = folder_source(folder, paths)
    paths[1].unlink()
    for read in (lambda: folder_source(folder, paths), lambda: count(source)):
        with pytest.raises(ValueError, match=f"{paths[1].name} cannot be read; expected a text"):
            read()
    with pytest.raises(ValueError, match=r"gone.jsonl cannot be read; .* change its permissions"):
        json_lines_source(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 3 of .*mine.jsonl is not JSON; .* correct the line"),
        ('["text"]', r"line 3 of .* has no text; .* found '\[\"text\"\]'"),
        ('{"title": "t"}', r"line 3 of .* has no text"),
        ('{"text": 5}', r"line 3 of .* has no text"),
        (r'{"text": "\ud800"}', r"expected characters that UTF-8 can hold in line 3 of"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    good = '{"title": "t", "text": "word"}'
    path.write_text("\n".join([good, good, line, good, good]))
    with pytest.raises(ValueError, match=message):
        count(json_lines_source(path))


def test_too_few_articles(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "word"}] * 2)
    with pytest.raises(ValueError, match=r"mine.jsonl: too few articles .* found 2"):
        json_lines_source(path)


def test_a_line_without_a_title_is_called_by_its_number(tmp_path):
    rows = [{"title": f"t{n}", "text": "a b"} for n in range(8)]
    rows[2]["title"], rows[5] = None, {"text": "c"}
    splits = read(json_lines_source(write_lines(tmp_path / "own.jsonl", rows)))
    titles = {article.title for split in splits.values() for article in split}
    assert titles == {"t0", "t1", "line 3", "t3", "t4", "line 6", "t6", "t7"}
