"""The loss of every word under every method, packed small enough to travel inside the page.

Losses are rounded to multiples of a step, so that each is known to half a step. A column is what
one method paid in one reading mode; it is kept as its difference, in steps, from an earlier column
that it resembles, which takes a third of the room. An article is one block: the number of each word
in the vocabulary, then its columns. All are numbers of three bytes, laid out byte by byte (every
lowest byte first), so that the upper ones, nearly all zero, vanish when the block is deflated. The
script page/unpack.js reads them back.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metalm.analysis.statistics.scores import ArticleScores, FloatArray, IntArray, Scores
from metalm.analysis.statistics.summary import best_rival

# Nats; the first with which everything fits is taken.
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
PLANES = 3
LARGEST = 2**22
# Step at which columns are compared; which of them resemble one another hardly depends on it.
RESEMBLANCE_STEP = 0.05
# Words from which resemblance and size are judged.
SAMPLE = 60_000


class Column(NamedTuple):
    """What one method paid in one reading mode."""

    mode: str
    """Reading mode."""
    method: str
    """Name of the method."""
    parent: int
    """Number of the earlier column that this one is the difference from; -1 for none."""


class Text(NamedTuple):
    """One article, with all the columns that score it."""

    article: ArticleScores
    """Title and words; of the losses, those of the first mode only."""
    losses: Mapping[int, FloatArray]
    """Number of a column -> nats per word [words]."""


class Arranged(NamedTuple):
    """Articles and columns, before losses are rounded."""

    columns: tuple[Column, ...]
    """Methods in reading modes, in the order in which blocks hold them."""
    texts: tuple[Text, ...]
    """Each article once, however many modes read it."""
    places: Mapping[str, tuple[int, ...]]
    """Reading mode -> number of the text of each of its articles."""


class Packed(NamedTuple):
    """Words and losses as the page carries them."""

    step: float
    """Nats between two neighbouring values."""
    vocabulary: str
    """The distinct words, commonest first: a JSON list, deflated, in base64."""
    blocks: tuple[str, ...]
    """For each text, deflated and in base64; empty where there was no room for it."""


def arrange(scores: Mapping[str, Scores], most: int | None = None) -> Arranged:
    """Finds which modes read the same articles, and which columns resemble one another.

    Args:
        scores: reading mode -> scores of the split in that mode.
        most: methods that are kept in each mode, the most telling ones; None for all.
    """
    methods = {mode: most_telling(s, most or len(s.methods)) for mode, s in scores.items()}
    columns, texts, places = _columns_and_texts(scores, methods)
    return Arranged(_with_parents(columns, texts), texts, places)


def pack(arranged: Arranged, room: int) -> Packed:
    """Packs words and losses, as finely as there is room for.

    Where even the coarsest step is too much, the last articles keep no words.

    Args:
        arranged: what is packed.
        room: bytes that vocabulary and blocks may take together.
    """
    columns, texts, _ = arranged
    words = _commonest_first(texts)
    vocabulary = deflated(json.dumps(list(words)).encode())
    left = room - len(vocabulary)
    packed: tuple[str, ...] = ()
    for step in STEPS:
        if step != STEPS[-1] and _guess_size(texts, columns, words, step) > left:
            continue
        packed = tuple(_block(text, columns, words, step) for text in texts)
        if sum(map(len, packed)) <= left:
            break
    ends = np.cumsum([len(block) for block in packed])
    kept = tuple(block if end <= left else "" for block, end in zip(packed, ends, strict=True))
    return Packed(step, vocabulary, kept)


def fits(arranged: Arranged, room: int) -> bool:
    """Whether all words and losses will go into the room at some step, judged by a sample."""
    words = _commonest_first(arranged.texts)
    size = _guess_size(arranged.texts, arranged.columns, words, STEPS[-1])
    return size + len(deflated(json.dumps(list(words)).encode())) <= room


def deflated(content: bytes) -> str:
    """Bytes in zlib's format and base64, as the page's scripts unpack them."""
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def first_compared(scores: Scores) -> tuple[str, str]:
    """The best of ours (of all, if none adapts), and the method it is measured against."""
    among = [m for m in scores.ours if m in scores.adaptive] or list(scores.adaptive)
    best = min(among or scores.methods, key=scores.perplexity)
    return best, scores.baselines[best]


def most_telling(scores: Scores, most: int) -> tuple[str, ...]:
    """The best of ours, what it is measured against, the best rival, then by perplexity."""
    first = [*first_compared(scores), best_rival(scores)]
    ranked = dict.fromkeys([*first, *sorted(scores.methods, key=scores.perplexity)])
    kept = set(list(ranked)[: max(2, most)])
    return tuple(method for method in scores.methods if method in kept)


def _columns_and_texts(
    scores: Mapping[str, Scores], methods: Mapping[str, Sequence[str]]
) -> tuple[tuple[Column, ...], tuple[Text, ...], dict[str, tuple[int, ...]]]:
    """Columns without parents; texts, each once; and where each mode's articles are among them."""
    columns = [Column(mode, method, -1) for mode in scores for method in methods[mode]]
    numbers = {(column.mode, column.method): number for number, column in enumerate(columns)}
    found: dict[object, tuple[ArticleScores, dict[int, FloatArray]]] = {}
    places: dict[str, tuple[int, ...]] = {}
    for mode, of_mode in scores.items():
        times: Counter[object] = Counter()
        keys = []
        for article in of_mode.articles:
            same = (article.title, tuple(article.words))
            # An article that a mode read twice is two texts.
            keys.append((same, times[same]))
            times[same] += 1
            _, losses = found.setdefault(keys[-1], (article, {}))
            losses.update({numbers[mode, m]: article.losses[m] for m in methods[mode]})
        order = {key: number for number, key in enumerate(found)}
        places[mode] = tuple(order[key] for key in keys)
    return tuple(columns), tuple(Text(*text) for text in found.values()), places


def _commonest_first(texts: Sequence[Text]) -> dict[str, int]:
    """Word -> its number; common words have small ones."""
    counts = Counter(word for text in texts for word in text.article.words)
    return {word: number for number, (word, _) in enumerate(counts.most_common())}


def _with_parents(columns: Sequence[Column], texts: Sequence[Text]) -> tuple[Column, ...]:
    """Gives each column the earlier one from which its differences carry the least information."""
    held = [{n for n, text in enumerate(texts) if c in text.losses} for c in range(len(columns))]
    related = []
    for number, column in enumerate(columns):
        sample = _sample([text for text in texts if number in text.losses])
        own = _in_steps(sample, number)
        bits = {-1: _entropy(own)}
        for earlier in range(number):
            if held[number] <= held[earlier]:
                bits[earlier] = _entropy(own - _in_steps(sample, earlier))
        related.append(column._replace(parent=min(bits, key=lambda parent: bits[parent])))
    return tuple(related)


def _sample(texts: Sequence[Text]) -> list[Text]:
    """Texts from all over the split, of about as many words as tell what the whole is like."""
    total = sum(text.article.num_words for text in texts)
    return list(texts[:: max(1, min(len(texts), total // SAMPLE))])


def _guess_size(
    texts: Sequence[Text], columns: Sequence[Column], words: Mapping[str, int], step: float
) -> float:
    """Bytes that all blocks will take, judged by a sample of them."""
    sample = _sample(texts)
    share = sum(t.article.num_words for t in sample) / sum(t.article.num_words for t in texts)
    return sum(len(_block(text, columns, words, step)) for text in sample) / share


def _block(text: Text, columns: Sequence[Column], words: Mapping[str, int], step: float) -> str:
    """One text: word numbers, then its columns in order, as planes of bytes."""
    steps = {number: in_steps(loss, step) for number, loss in sorted(text.losses.items())}
    arrays = [np.array([words[word] for word in text.article.words], np.int64)]
    for number, own in steps.items():
        parent = columns[number].parent
        arrays.append(_unsigned(own if parent < 0 else own - steps[parent]))
    values = np.stack(arrays).astype("<u4")
    planes = values.view(np.uint8).reshape(*values.shape, 4)[..., :PLANES]
    return deflated(planes.transpose(2, 0, 1).tobytes())


def in_steps(losses: FloatArray, step: float) -> IntArray:
    """Losses in whole steps, to the nearest [words]."""
    limit = LARGEST / 2 - 1
    return np.clip(np.rint(losses / step), -limit, limit).astype(np.int64)


def _in_steps(texts: Sequence[Text], column: int) -> IntArray:
    return in_steps(np.concatenate([text.losses[column] for text in texts]), RESEMBLANCE_STEP)


def _unsigned(numbers: IntArray) -> IntArray:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..."""
    return np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)


def _entropy(numbers: IntArray) -> float:
    """Bits per number if each is coded by how often it occurs."""
    counts: NDArray[np.int64] = np.unique(numbers, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
