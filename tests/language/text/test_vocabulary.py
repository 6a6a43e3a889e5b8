import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from metalm.language.text.vocabulary import Vocabulary, closed_words, learn_bpe, split_words

TEXTS = [
    "low lower lowest\nlow low newer\n",
    "the newer the wider\n\n the lowest = \n",
    "a naïve café — 日本 text\n",
]
AWKWARD = "\tn\u00a0b\x1cs\u2028p \n\n  Ċ Ġ \\n <eos> <unk> </s>\r\n🙂e\u0301\x00\x0b\x85z"


@pytest.fixture(scope="module")
def bpe():
    return learn_bpe(TEXTS, 270)


@pytest.fixture(scope="module")
def words():
    return closed_words(TEXTS, add_unknown=False)


def test_words_of_a_text_counted_by_hand():
    assert split_words("a b\n\n c \n") == ["a", "b", "\n", "\n", "c", "\n"]
    assert split_words("a\nb") == ["a", "\n", "b", "\n"]
    assert split_words("\n") == ["\n"]
    assert split_words("") == []


def test_number_of_words_is_whitespace_words_and_lines():
    for text in (*TEXTS, AWKWARD + "\n"):
        assert len(split_words(text)) == len(text.split()) + text.count("\n")


def test_byte_pairs_equal_the_tokenizer_run_on_whole_lines(bpe, tmp_path):
    bpe.save(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        expected = []
        for line in text.removesuffix("\n").split("\n"):
            expected += [token + 1 for token in tokenizer.encode(line).ids] + [0]
        assert bpe.encode(text).tokens.tolist() == expected


def test_byte_pair_merges_equal_greedy_merging_by_hand():
    # " low" x 4 and " lot" x 3 and " x" x 2: every choice is free of ties but the first, in which
    # "Ġl" and "lo" have count 7 each and lead to the same three characters.
    text = "low low low low lot lot lot x x\n"
    vocabulary = learn_bpe([text], 256 + 1 + 5)
    pieces = [tuple(" " + word) for word in text.split()]
    merged: set[str] = set()
    while True:
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not pairs or len(merged) == 5:
            break
        pair = max(pairs, key=lambda one: pairs[one])
        merged.add("".join(pair))
        pieces = [_merge(word, pair) for word in pieces]
    found = {vocabulary.token_text(token) for token in range(257, vocabulary.size)}
    assert {" lo", " low", " lot", " x"} <= found
    assert found - {" l", "lo"} == merged - {" l", "lo"}


def _merge(word, pair):
    result, index = [], 0
    while index < len(word):
        if word[index : index + 2] == pair:
            result.append("".join(pair))
            index += 2
        else:
            result.append(word[index])
            index += 1
    return tuple(result)


def test_tokens_of_a_word_spell_it(bpe, tmp_path):
    bpe.save(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*TEXTS, AWKWARD):
        tokens, words = bpe.encode(text)
        for index, word in enumerate(split_words(text)):
            ids = tokens[words == index]
            if word == "\n":
                assert ids.tolist() == [0]
            else:
                assert tokenizer.decode((ids - 1).tolist()) == " " + word


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_no_text_forges_an_end_of_line(kind, bpe):
    vocabulary = bpe if kind == "bpe" else closed_words([AWKWARD], add_unknown=False)
    tokens, words = vocabulary.encode(AWKWARD)
    assert (tokens == 0).sum() == AWKWARD.count("\n") + 1
    assert words[-1] + 1 == len(split_words(AWKWARD))
    assert set(np.diff(words)) <= {0, 1}
    assert tokens.dtype == words.dtype == np.int32
    assert tokens.max() < vocabulary.size


def test_a_batch_equals_its_texts_one_by_one(bpe, words):
    source = random.Random(0)
    pool = " ".join(TEXTS).split()
    texts = ["".join(source.choice([*pool, "\n", " "]) + " " for _ in range(n)) for n in (7, 0, 31)]
    for vocabulary in (bpe, words):
        for text, encoded in zip(texts, vocabulary.encode_batch(texts), strict=True):
            alone = vocabulary.encode(text)
            assert np.array_equal(alone.tokens, encoded.tokens)
            assert np.array_equal(alone.words, encoded.words)
    assert bpe.encode_batch([]) == []
    assert len(bpe.encode("").tokens) == 0


def test_whole_words_are_ordered_by_frequency_then_alphabet():
    vocabulary = closed_words(["b a b c\n", "c d b\n"], add_unknown=False)
    assert vocabulary.size == 5
    assert [vocabulary.token_text(token) for token in range(5)] == ["\n", "b", "c", "a", "d"]
    assert vocabulary.encode("d b\n\n").tokens.tolist() == [4, 1, 0, 0]
    assert vocabulary.encode("d b\n\n").words.tolist() == [0, 1, 2, 3]


def test_an_unknown_word_is_named(words):
    with pytest.raises(ValueError, match="expected one of its 14 entries, found 'highest'"):
        words.encode("low highest\n")


def test_an_unknown_word_becomes_unk_where_there_is_one():
    vocabulary = closed_words(["b a b c\n"], add_unknown=True, minimum_count=2)
    assert vocabulary.size == 3
    texts = [vocabulary.token_text(int(token)) for token in vocabulary.encode("b a z").tokens]
    assert texts == ["b", "<unk>", "<unk>", "\n"]
    assert vocabulary.token_text(vocabulary.unknown) == "<unk>"
    present = closed_words(["a <unk> <unk>\n"], add_unknown=True)
    assert present.size == 3
    assert closed_words(["b a\n"], add_unknown=False).unknown is None


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_a_saved_vocabulary_is_the_same(kind, bpe, words, tmp_path):
    vocabulary = bpe if kind == "bpe" else words
    vocabulary.save(tmp_path / "new" / "folder")
    loaded = Vocabulary.load(tmp_path / "new" / "folder")
    assert (loaded.kind, loaded.size, loaded.checksum) == (
        kind,
        vocabulary.size,
        vocabulary.checksum,
    )
    for text in TEXTS:
        assert np.array_equal(loaded.encode(text).tokens, vocabulary.encode(text).tokens)
    assert bpe.checksum != words.checksum


def test_the_same_text_gives_the_same_byte_pairs(bpe):
    assert learn_bpe(iter(TEXTS), 270).checksum == bpe.checksum
    assert bpe.size == len(bpe) == 270


def test_a_small_text_gives_fewer_byte_pairs_than_wanted():
    assert learn_bpe(["ab ab\n"], 400).size == 256 + 1 + 2


def test_too_small_a_size_for_byte_pairs():
    with pytest.raises(ValueError, match=r"expected a size of at least 257 .* found 256"):
        learn_bpe(TEXTS, 256)


@pytest.mark.parametrize("token", [-1, 270])
def test_a_token_out_of_range(bpe, token):
    with pytest.raises(ValueError, match=rf"expected an id in \[0, 270\), found {token}"):
        bpe.token_text(token)


def test_damaged_files_are_refused(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read; expected vocabulary.json"):
        Vocabulary.load(tmp_path)
    bpe.save(tmp_path)
    description = json.loads((tmp_path / "vocabulary.json").read_text())
    (tmp_path / "vocabulary.json").write_text(json.dumps(description | {"size": 271}))
    with pytest.raises(ValueError, match="was altered; expected 271 entries, found 270"):
        Vocabulary.load(tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps(description | {"kind": "letter"}))
    with pytest.raises(ValueError, match="expected one of word, bpe, found 'letter'"):
        Vocabulary.load(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Vocabulary.load(tmp_path)
