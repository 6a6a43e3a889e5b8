import math

import numpy as np
import pytest

from metalm.language.memory.related_articles import nearest_earlier, similarities

TEXTS = [
    "the storm , the storm . <unk>",
    "The ship sank 12 times in the Storm",
    "the album <unk>",
    "storm the ship the ship",
    "",
]


def by_hand(texts):
    """Cosines of tf-idf, word by word, with dictionaries."""
    found = []
    words = [
        [w for w in "".join(c if c.isalpha() else " " for c in t.lower()).split() if w != "unk"]
        for t in texts
    ]
    for of_text in words:
        vector = {}
        for w in set(of_text):
            texts_with = sum(w in other for other in words)
            vector[w] = (1 + math.log(of_text.count(w))) * math.log(len(texts) / texts_with)
        norm = math.sqrt(sum(v * v for v in vector.values()))
        found.append({w: v / norm for w, v in vector.items()} if norm else {})
    return [[sum(v * b.get(w, 0.0) for w, v in a.items()) for b in found] for a in found]


def test_similarities_are_cosines_of_tf_idf():
    found = similarities(TEXTS)
    np.testing.assert_allclose(found, by_hand(TEXTS), atol=1e-14)
    np.testing.assert_allclose(np.diag(found)[:4], 1.0)
    assert found[1, 3] > found[1, 2] > 0
    assert found[0, 3] > found[0, 2] > 0


def test_a_word_of_all_texts_says_nothing():
    assert similarities(["a b", "a c"])[0, 1] == 0.0
    assert similarities(["a b", "a b", "c a"])[0, 1] == pytest.approx(1.0)


def test_nearest_earlier_looks_back_only():
    similarity = np.array(
        [[1.0, 0.2, 0.9, 0.1], [0.2, 1.0, 0.3, 0.8], [0.9, 0.3, 1.0, 0.4], [0.1, 0.8, 0.4, 1.0]]
    )
    nearest, cosines = nearest_earlier(similarity)
    assert nearest.tolist() == [-1, 0, 0, 1]
    assert cosines.tolist() == [0.0, 0.2, 0.9, 0.8]
