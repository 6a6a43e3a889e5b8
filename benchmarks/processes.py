"""Two processes that share the rows of every batch, against one.

    torchrun --standalone --nproc-per-node 2 -- benchmarks/processes.py [--rounds 7] [--steps 4]

Of base training and of joint training (first order), three ways take turns: one process of one
thread (process 0, while the others wait), one process of several threads (--threads, by default as
many as there are processes; 1 leaves this way out, which crawls where the cores are busy), and all
processes together, one thread each. Text and weights are random; the sizes are those of the
preset `tiny` unless others are asked for. Printed: medians in tokens per second, ratios to the
first way in the same round, and what adding up the gradients takes of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from metalm.language.network.model import LanguageModel
from metalm.language.run.presets import ExperimentConfig, preset_named
from metalm.language.text.articles import SCHEMA, ArticleSet
from metalm.language.training.base_training import BaseTraining
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import starting_rule
from metalm.meta.parameters import choose, split
from metalm.training import processes
from metalm.training.allocator import keep_freed_memory

Training = BaseTraining | MetaTraining

LENGTH = 2000
ONE, ALL, ADDING = "one process", "processes", "adding up gradients"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=4, help="in each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    config = preset_named(options.preset)
    size = config.data.vocabulary_size
    config = replace(config, model=replace(config.model, vocabulary_size=size))
    with processes.together():
        of_base = config.base.rows * config.base.window
        of_joint = config.joint.rows * config.joint.segment * config.joint.unroll
        trainings: dict[str, tuple[Callable[[ExperimentConfig], Training], int]] = {
            "base": (base, of_base),
            "joint": (joint, of_joint),
        }
        for name, (build, tokens) in trainings.items():
            threads = options.threads or processes.count()
            times = measure(partial(build, config), options.steps, options.rounds, threads)
            if processes.is_first():
                report(name, tokens * options.steps, times)


def base(config: ExperimentConfig) -> BaseTraining:
    """Ordinary training from random weights."""
    torch.manual_seed(0)
    model = LanguageModel(config.model)
    return BaseTraining(model, articles(config), config.base, lambda _: 1e-3, 0)


def joint(config: ExperimentConfig) -> MetaTraining:
    """Training of the rule and W_0 together."""
    torch.manual_seed(0)
    model = LanguageModel(config.model)
    names = choose(model, config.rule.adapt)
    slow, _ = split(model, names)
    rms = {name: torch.rand_like(weight) * 1e-3 + 1e-4 for name, weight in slow.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rule = starting_rule(rms, config.rule)
    return MetaTraining(
        model,
        rule,
        names,
        articles(config),
        config.joint,
        lambda _: 1e-3,
        0,
        optimizer,
        lambda _: 1e-4,
    )


def articles(config: ExperimentConfig) -> ArticleSet:
    """As many long articles of random tokens as rows are read at once."""
    random = np.random.default_rng(0)
    count = max(config.base.rows, config.joint.rows)
    rows = [
        {
            "title": str(number),
            "text": " ".join("w" * LENGTH),
            "tokens": random.integers(0, config.model.vocabulary_size, LENGTH).tolist(),
            "words": list(range(LENGTH)),
            "num_words": LENGTH,
        }
        for number in range(count)
    ]
    return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))


def measure(
    build: Callable[[], Training], steps: int, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of so many steps, in each way, the ways taking turns after one round to warm up."""
    alone: list[Training] = []  # built by process 0 as if it were the only one: it has all rows
    processes.first_alone(lambda: alone.append(build()))
    shared, count = build(), processes.count()

    def by_one(threads: int) -> float:
        return processes.first_alone(lambda: seconds(lambda: take(alone[0], steps, threads)))

    def by_all(work: Callable[[], None]) -> float:
        processes.sums(0.0)  # so that all begin at the same time
        return seconds(work)

    ways: dict[str, Callable[[], float]] = {
        ONE: lambda: by_one(1),
        f"{count} {ALL}": lambda: by_all(lambda: take(shared, steps, 1)),
        ADDING: lambda: by_all(lambda: add_gradients(shared, steps)),
    }
    if threads > 1:
        ways[f"one process, {threads} threads"] = lambda: by_one(threads)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, timed in ways.items():
            found = timed()
            if number > 0:
                times[way].append(found)
    return times


def take(training: Training, steps: int, threads: int) -> None:
    """Takes steps with so many threads, and goes back to one."""
    torch.set_num_threads(threads)
    for index in range(steps):
        training.step(index)
    torch.set_num_threads(1)


def add_gradients(training: Training, steps: int) -> None:
    """What the steps send to each other, without the steps."""
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    for _ in range(steps):
        processes.add_up(gradients)


def seconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(name: str, tokens: int, times: dict[str, list[float]]) -> None:
    """Prints medians and ratios of one training."""
    print(f"{name}: {tokens} tokens in each of {len(times[ONE])} rounds")
    for way, taken in times.items():
        ratios = [one / this for one, this in zip(times[ONE], taken, strict=True)]
        middle = statistics.median(taken)
        if way == ADDING:
            (of_all,) = (statistics.median(times[other]) for other in times if ALL in other)
            share = middle / of_all
            print(f"  {way:<24}: {middle * 1e3:8.1f} ms, {share:.0%} of the time of all processes")
            continue
        print(
            f"  {way:<24}: {tokens / middle:8.0f} tokens/s, {statistics.median(ratios):.2f} times "
            f"one process ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
