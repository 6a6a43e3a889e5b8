"""The cache's theta and lambda: chosen once, learned, or said anew for each token by a network.

    python benchmarks/learned_cache.py RUN [--learning joint rms] [--tokens 1500] [--out FILE]

RUN is a tuned run. Its methods of one and of two fast copies read, in the reset mode, the
validation articles that tuning uses and the beginnings of the others, with caches of every theta of
the grid. A mixture of caches of several theta is a cache whose theta depends on the context where
its weights do. Everything is fitted on the first articles and shown on the others. No test article
is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.corpora import prepare_as
from metalm.analysis.statistics.bootstrap import ratio_intervals
from metalm.analysis.tables import interval_text
from metalm.language.reading.beginnings import beginnings, num_words
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.copy_readings import Request, Texts, read_copies
from metalm.language.reading.methods import NAMES, Method, TrainedModels
from metalm.language.reading.mixing import STEP, Floats, mixture
from metalm.language.reading.mixture_network import fit_mixture_network, learned_mixture_nats
from metalm.language.reading.reader import CacheGrid, Readings
from metalm.language.run.opened_run import open_run
from metalm.language.run.trial_files import read_trials
from metalm.language.tuning.comparison import compared_methods
from metalm.language.tuning.tune import best_cache
from metalm.language.tuning.tuning_text import TuningConfig, tuning_articles, tuning_text
from metalm.training.allocator import keep_freed_memory
from metalm.training.disk import write_at_once

Losses = list[Floats]
"""Nats of every token of every text."""
Copies = Sequence[Readings]
"""Of the same texts."""


class Said(NamedTuple):
    """What is mixed for one text."""

    log_probabilities: Floats
    """[predictors, tokens]."""
    prior: list[float]
    """[predictors]."""
    features: Tensor
    """[tokens, features]."""


def main() -> None:
    """Reads, fits, shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a folder that train.py wrote, tuned for the reset mode")
    parser.add_argument("--learning", nargs="+", default=["joint", "rms"], choices=["joint", "rms"])
    parser.add_argument("--tokens", type=int, default=1500, help="of each article that is shown")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    run = open_run(options.run, prepare_as)
    config, articles = run.config.tuning, run.corpus.valid
    trials = read_trials(run.folder, "reset")
    methods = {method.name: method for method in compared_methods(trials)}
    tuned = tuning_articles(articles, config)
    shown = articles.select([place for place in range(len(articles)) if place not in tuned])
    words = num_words(list(shown), options.tokens)
    texts = [tuning_text(articles, config, "reset").texts, beginnings(list(shown), options.tokens)]
    models, found = run.trained(), []
    for learning in options.learning:
        for suffix in ("", ", two rates"):
            method = methods[f"{NAMES[learning]}{suffix} + cache"]
            fitted, seen = (read(models, method, each, config) for each in texts)
            losses = ways(fitted, seen, config)
            found += table(method.name, losses, words)
            if options.out is not None:
                write_at_once(options.out, json.dumps(found, indent=1) + "\n")


def read(models: TrainedModels, method: Method, texts: Texts, config: TuningConfig) -> Copies:
    """Readings of every copy, with caches of every theta."""
    grid = CacheGrid(thetas=config.thetas, window=config.window)
    requests = [Request(copy, grid) for copy in method.copies()]
    read: dict[int, Readings] = {}
    for places, several in read_copies(models, requests, texts, config.rows, confidence=True):
        read.update(zip(places, several, strict=True))
    return [read[place] for place in range(len(requests))]


def ways(fitted: Copies, seen: Copies, config: TuningConfig) -> dict[str, Losses]:
    """Name of each way to have a cache -> what it makes of the texts that are shown."""
    cache, _ = best_cache(fitted, config)
    place = config.thetas.index(cache.theta)
    one, every = [place], list(range(len(config.thetas)))

    def known(text: Said) -> Tensor:
        return text.features

    def nothing(text: Said) -> Tensor:
        return torch.zeros(len(text.features), 1)

    def mixed(thetas: Sequence[int], step: float, what: Callable[[Said], Tensor]) -> Losses:
        before, now = (predictors(copies, thetas, cache.share) for copies in (fitted, seen))
        network = fit_mixture_network(
            [what(text) for text in before],
            [mixture(text.log_probabilities, text.prior, step).logits for text in before],
            [text.log_probabilities for text in before],
        )
        return [
            learned_mixture_nats(
                network,
                what(text),
                mixture(text.log_probabilities, text.prior, step).logits,
                text.log_probabilities,
            )
            for text in now
        ]

    def weighed(thetas: Sequence[int]) -> Losses:
        now = predictors(seen, thetas, cache.share)
        return [mixture(text.log_probabilities, text.prior).nats for text in now]

    return {
        f"chosen (theta {cache.theta:g}, lambda {cache.share:g})": nats_of_copies(
            seen, place, cache.share
        ),
        "lambda learned": mixed(one, 0.0, nothing),
        "theta and lambda learned": mixed(every, 0.0, nothing),
        "lambda learns from each token": weighed(one),
        "theta and lambda learn from each token": weighed(every),
        "the same, and a network adjusts lambda": mixed(one, STEP, known),
        "the same, and a network adjusts theta and lambda": mixed(every, STEP, known),
    }


def predictors(copies: Copies, thetas: Sequence[int], share: float) -> list[Said]:
    """Copies, and caches of these theta, which share lambda evenly at first."""
    found = []
    for text in range(len(copies[0].nats)):
        caches = copies[-1].cache[text][thetas]
        flatnesses = len(copies[-1].cache[text])
        numbers = [2 + theta for theta in thetas]
        numbers += [2 + flatnesses + theta for theta in thetas]
        numbers += [2 + 2 * flatnesses, 3 + 2 * flatnesses]
        features = [copy.confidence[text][:2] for copy in copies]
        features.append(copies[-1].confidence[text][numbers])
        found.append(
            Said(
                np.concatenate([[-copy.nats[text] for copy in copies], caches]),
                [(1 - share) / len(copies)] * len(copies) + [share / len(thetas)] * len(thetas),
                torch.from_numpy(np.concatenate(features)).t().clamp(min=-1e3),
            )
        )
    return found


def table(method: str, losses: dict[str, Losses], words: Floats) -> list[dict[str, object]]:
    """Prints a table of the ways, and gives what is in it."""
    nats = np.array([[text.sum() for text in of_way] for of_way in losses.values()])
    found = []
    print(f"\n| {method} | perplexity per word | of the chosen one (95 %) |\n|---|---|---|")
    ratios = ratio_intervals(nats - nats[0], words)
    for way, of_way, ratio in zip(losses, nats, ratios, strict=True):
        perplexity = float(np.exp(of_way.sum() / words.sum()))
        text = interval_text(ratio.map(lambda bound: float(np.exp(bound))))
        print(f"| {way} | {perplexity:.2f} | {text} |", flush=True)
        found.append(
            {
                "method": method,
                "way": way,
                "perplexity": perplexity,
                "of_chosen": [None if bound is None else float(np.exp(bound)) for bound in ratio],
                "nats": of_way.tolist(),
            }
        )
    return found


if __name__ == "__main__":
    main()
