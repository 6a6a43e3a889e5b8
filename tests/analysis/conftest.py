"""Simulated scores: Zipfian words, gains that grow along the article and differ by article."""

from collections.abc import Callable

import numpy as np
import pytest

from metalm.analysis import ArticleScores, Scores

METHODS = ("static", "dynamic evaluation", "cache", "metalm static", "metalm", "metalm + cache")
BASELINES = {"metalm": "metalm static", "metalm + cache": "metalm static"}
GAIN = {"dynamic evaluation": 0.1, "cache": 0.05, "metalm": 0.15, "metalm + cache": 0.2}


@pytest.fixture
def simulate() -> Callable[..., Scores]:
    def build(lengths: tuple[int, ...] = (700, 130, 300, 45, 513), seed: int = 3) -> Scores:
        random = np.random.default_rng(seed)
        articles = []
        for index, length in enumerate(lengths):
            ids = np.minimum(random.zipf(1.3, length), 500)
            words = ["\n" if i == 7 else "<unk>" if i == 5 else f"w{i}" for i in ids]
            static = random.gamma(2.0, 2.5, length)
            own = random.normal(1.0, 0.2)
            grown = own * np.log2(2 + np.arange(length) / 50)
            losses = {
                method: static - GAIN.get(method, 0.0) * grown + random.normal(0, 0.1, length)
                for method in METHODS
            }
            articles.append(ArticleScores(title=f"title {index}", words=words, losses=losses))
        return Scores(methods=METHODS, articles=tuple(articles), baselines=BASELINES)

    return build
