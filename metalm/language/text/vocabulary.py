"""Words, tokens, and which word each token belongs to.

Text model: an article is a sequence of lines; a line is its whitespace-separated words followed by
one end of line. The number of words of a text is therefore (whitespace words + lines), whatever the
tokenizer, which makes perplexities per word of different tokenizers comparable.

Token 0 is the end of line. It is outside the tokenizer, whose own ids are shifted by one, so no
text can contain it except by ending a line.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metalm.training.disk import write_at_once

Kind = Literal["word", "bpe"]
END_OF_LINE = 0
END_OF_LINE_TEXT = "\n"
UNKNOWN = "<unk>"
TOKENIZER_FILE = "tokenizer.json"
DESCRIPTION_FILE = "vocabulary.json"


class Encoded(NamedTuple):
    """Tokens of one text and the word each one belongs to.

    Attributes:
        tokens: int32 [tokens], ids in [0, vocabulary size).
        words: int32 [tokens], index of the token's word; counts words and ends of line, never
            falls.
    """

    tokens: NDArray[np.int32]
    words: NDArray[np.int32]


def split_words(text: str) -> list[str]:
    """Whitespace words of a text in order, with a newline character standing for each end of line.

    The last line counts as a line whether or not the text ends with a newline; an empty text has
    none. Only the newline character ends a line; every other white space merely separates words.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    words: list[str] = []
    for line in lines:
        words.extend(line.split())
        words.append(END_OF_LINE_TEXT)
    return words


class Vocabulary:
    """Tokens of a corpus: id 0 ends a line, ids 1 ... size - 1 are the tokenizer's, shifted by one.

    Args:
        tokenizer: word-level or byte-pair tokenizer in which every word is tokenised on its own.
        kind: "word" or "bpe".
    """

    def __init__(self, tokenizer: Tokenizer, kind: Kind) -> None:
        if kind not in get_args(Kind):
            raise ValueError(
                f"unknown kind of vocabulary; expected one of {', '.join(get_args(Kind))}, "
                f"found {kind!r}; prepare the corpus again"
            )
        self.kind: Kind = kind
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = tokenizer.get_vocab() if kind == "word" else {}
        self.size: int = tokenizer.get_vocab_size() + 1

    def __len__(self) -> int:
        return self.size

    @property
    def checksum(self) -> str:
        """SHA-256 of the tokenizer: equal exactly when two vocabularies are the same."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> Encoded:
        """Tokens of one text; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of several texts.

        Each distinct word is tokenised once for the whole batch; the rest is array indexing.

        Raises:
            ValueError: a word is unknown and the vocabulary has no "<unk>".
        """
        rows: dict[str, int] = {END_OF_LINE_TEXT: 0}
        word_rows = []
        for text in texts:
            words = split_words(text)
            found = (rows.setdefault(word, len(rows)) for word in words)
            word_rows.append(np.fromiter(found, np.int64, len(words)))
        distinct = list(rows)[1:]
        pieces = [[END_OF_LINE], *self._word_tokens(distinct)]
        counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
        table = np.fromiter((token for piece in pieces for token in piece), np.int32, counts.sum())
        starts = np.cumsum(counts) - counts
        return [_gather(row, table, starts, counts) for row in word_rows]

    def _word_tokens(self, words: Sequence[str]) -> list[list[int]]:
        if self.kind == "bpe":
            encodings = self._tokenizer.encode_batch(words, add_special_tokens=False)
            return [[token + 1 for token in encoding.ids] for encoding in encodings]
        unknown = self._ids.get(UNKNOWN)
        tokens = []
        for word in words:
            token = self._ids.get(word, unknown)
            if token is None:
                raise ValueError(
                    f"a word is not in the closed vocabulary; expected one of its {self.size} "
                    f"entries, found {word!r}; prepare the corpus that the text belongs to, or use "
                    "byte pairs"
                )
            tokens.append([token + 1])
        return tokens

    @property
    def unknown(self) -> int | None:
        """The token that stands for every word outside; None if there is no such word."""
        return self._ids[UNKNOWN] + 1 if UNKNOWN in self._ids else None

    def token_text(self, token: int) -> str:
        """Text of one token, for people; a byte pair that begins a word begins with a space."""
        if not 0 <= token < self.size:
            raise ValueError(
                f"no such token; expected an id in [0, {self.size}), found {token}; "
                "use the vocabulary that the tokens were made with"
            )
        if token == END_OF_LINE:
            return END_OF_LINE_TEXT
        if self.kind == "word":
            return str(self._tokenizer.id_to_token(token - 1))
        return self._tokenizer.decode([token - 1], skip_special_tokens=False)

    def save(self, path: Path | str) -> None:
        """Write the folder `path`: the tokenizer, and a description with the kind and the size."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_at_once(folder / TOKENIZER_FILE, self._tokenizer.to_str())
        description = {"kind": self.kind, "size": self.size, "end_of_line": END_OF_LINE}
        text = json.dumps(description, indent=2) + "\n"
        write_at_once(folder / DESCRIPTION_FILE, text)

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, or the size is not the one recorded.
        """
        folder = Path(path)
        try:
            description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
            kind, size = description["kind"], description["size"]
            tokenizer = Tokenizer.from_str((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ValueError(
                f"the vocabulary in {folder} cannot be read; expected {DESCRIPTION_FILE} and "
                f"{TOKENIZER_FILE} as written by Vocabulary.save, found {type(error).__name__}: "
                f"{error}; prepare the corpus again"
            ) from error
        vocabulary = cls(tokenizer, kind)
        if vocabulary.size != size:
            raise ValueError(
                f"the vocabulary in {folder} was altered; expected {size} entries, "
                f"found {vocabulary.size}; prepare the corpus again"
            )
        return vocabulary


def learn_bpe(texts: Iterable[str], size: int) -> Vocabulary:
    """Learn byte pairs (Sennrich et al. 2016, on bytes) from whitespace words.

    Every word is tokenised on its own, beginning with a marker of the space before it. All 256
    bytes are tokens, so nothing is unknown, and there are no special tokens.

    Args:
        texts: training texts only.
        size: entries wanted, the end of line included; a small corpus may give fewer.

    Raises:
        ValueError: `size` has no room for the end of line and the 256 bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 1
    if size < least:
        raise ValueError(
            f"the vocabulary is too small for byte pairs; expected a size of at least {least} "
            f"(256 bytes and the end of line), found {size}; choose a larger vocabulary size"
        )
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return Vocabulary(tokenizer, "bpe")


def closed_words(texts: Iterable[str], *, add_unknown: bool, minimum_count: int = 1) -> Vocabulary:
    """Vocabulary of whole words, the most frequent first (ties in alphabetical order).

    Args:
        texts: texts whose words make the vocabulary.
        add_unknown: add "<unk>", which then stands for every other word.
        minimum_count: leave out words that occur less often; with 2 and `add_unknown`, the words
            met once teach a model what "<unk>" is.
    """
    counts = Counter(word for text in texts for word in text.split())
    kept = [word for word, count in counts.items() if count >= minimum_count]
    if add_unknown and counts[UNKNOWN] < minimum_count:
        kept.append(UNKNOWN)
    kept.sort(key=lambda word: (-counts[word], word))
    ids = {word: token for token, word in enumerate(kept)}
    unknown = {"unk_token": UNKNOWN} if UNKNOWN in ids else {}
    tokenizer = Tokenizer(models.WordLevel(ids, **unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Vocabulary(tokenizer, "word")


def _gather(
    rows: NDArray[np.int64],
    table: NDArray[np.int32],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> Encoded:
    """Concatenate table[starts[r] : starts[r] + counts[r]] for every r in rows."""
    lengths = counts[rows]
    words = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
    begin = np.cumsum(lengths) - lengths
    within = np.arange(len(words)) - np.repeat(begin, lengths)
    tokens = table[np.repeat(starts[rows], lengths) + within]
    return Encoded(tokens, words)
