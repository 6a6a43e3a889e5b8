"""Which articles to learn from, to choose on, and to test on, where nobody has decided it."""

from __future__ import annotations

import random

from metalm.language.text.articles import SPLITS

VALID_SHARE = 0.1
TEST_SHARE = 0.1


def split_indices(num_articles: int, seed: int) -> dict[str, list[int]]:
    """Split 0 ... num_articles - 1 into train, valid and test, about 80 / 10 / 10, in random order.

    Each part has at least one article.

    Raises:
        ValueError: there are fewer than three articles.
    """
    if num_articles < len(SPLITS):
        raise ValueError(
            f"too few articles to learn from, choose on and test on; expected at least "
            f"{len(SPLITS)}, found {num_articles}; add articles, or cut the text into several"
        )
    indices = list(range(num_articles))
    random.Random(seed).shuffle(indices)
    num_valid = max(1, round(VALID_SHARE * num_articles))
    num_test = max(1, round(TEST_SHARE * num_articles))
    num_train = num_articles - num_valid - num_test
    return {
        "train": indices[:num_train],
        "valid": indices[num_train : num_train + num_valid],
        "test": indices[num_train + num_valid :],
    }
