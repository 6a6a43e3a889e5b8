"""How much articles have to do with one another, measured on their words alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[a-z]+")
_UNKNOWN = "unk"  # what WikiText writes for rare words says nothing of a subject


def similarities(texts: Sequence[str]) -> NDArray[np.float64]:
    """Cosines between tf-idf vectors, [texts, texts]; 0 for a text without a word of its own.

    tf = 1 + log count, idf = log (texts / texts with the word), words in lower case: the weights
    "ltc" of Salton and Buckley (1988).
    """
    words = [[w for w in _WORD.findall(text.lower()) if w != _UNKNOWN] for text in texts]
    index = {w: number for number, w in enumerate(sorted({w for text in words for w in text}))}
    counts = np.zeros((len(texts), len(index)))
    for row, text in zip(counts, words, strict=True):
        np.add.at(row, [index[w] for w in text], 1)
    present = counts > 0
    vectors = np.where(present, 1 + np.log(np.maximum(counts, 1)), 0.0)
    vectors *= np.log(len(texts) / np.maximum(present.sum(0), 1))
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.asarray(vectors @ vectors.T)


def nearest_earlier(
    similarity: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each text, the number of the earlier one most like it, and how like; -1 and 0 for none.

    Args:
        similarity: [texts, texts].
    """
    count = len(similarity)
    nearest, cosines = np.full(count, -1, np.int64), np.zeros(count)
    for number in range(1, count):
        earlier = similarity[number, :number]
        nearest[number], cosines[number] = int(earlier.argmax()), float(earlier.max())
    return nearest, cosines
