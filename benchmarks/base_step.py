"""What a step of ordinary training costs beside the same model written on `torch.nn.LSTM`.

    python benchmarks/base_step.py [--rows 32] [--window 64] [--rounds 9] [--vocabulary 6000]
        [--sizes 256 640 2] [--awd] [--threads 1]

Three steps take turns in one process, on the same articles: (a) `BaseTraining` with LSTM layers;
(b) the plainest program for the same model: `nn.Embedding`, `nn.LSTM`, a tied `nn.Linear`, locked
dropout, cross entropy, clipping, AdamW; (c) `BaseTraining` with QRNN layers of the same sizes.
Printed: medians, and the ratios a/b and c/a. `--awd` has the sizes and the dropout of AWD-LSTM.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from metalm.language.network.model import LanguageModel, ModelConfig, locked_dropout
from metalm.language.text.articles import SCHEMA, ArticleSet
from metalm.language.training.base_training import BaseTraining, BaseTrainingConfig
from metalm.training.allocator import keep_freed_memory
from metalm.training.precision import reduced_products


def main() -> None:
    """Measures and prints."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    embedding, hidden, layers = (400, 1150, 3) if options.awd else options.sizes
    config = ModelConfig(
        vocabulary_size=33_278 if options.awd else options.vocabulary,
        embedding_size=embedding,
        hidden_size=hidden,
        num_layers=layers,
    )
    if options.awd:
        config = replace(
            config,
            input_dropout=0.65,
            hidden_dropout=0.2,
            output_dropout=0.4,
            embedding_dropout=0.1,
        )
    recipe = BaseTrainingConfig(rows=options.rows, window=options.window)
    articles = random_articles(options, config.vocabulary_size)
    ours = BaseTraining(LanguageModel(config), articles, recipe, lambda _: 1.0, seed=1)
    qrnn = LanguageModel(replace(config, cell="qrnn"))
    quasi = BaseTraining(qrnn, articles, recipe, lambda _: 1.0, seed=1)
    steps = [
        numbered(ours.step),
        plain_step(PlainModel(config), articles, recipe),
        numbered(quasi.step),
    ]
    times = take_turns(steps, options.rounds)
    tokens = options.rows * options.window
    names = ("metalm, LSTM", "torch.nn.LSTM", "metalm, QRNN")
    print(options)
    for name, column in zip(names, times, strict=True):
        median = statistics.median(column)
        print(f"{name:14} {median * 1e3:8.0f} ms a step {tokens / median:8,.0f} tokens/s")
    print(f"LSTM of metalm / torch.nn.LSTM: {ratio(times[0], times[1])}")
    print(f"QRNN / LSTM of metalm: {ratio(times[2], times[0])}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--sizes", type=int, nargs=3, default=(256, 640, 2))
    parser.add_argument("--awd", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def random_articles(options: argparse.Namespace, vocabulary: int) -> ArticleSet:
    """One long article a row, so that every window is full."""
    random = np.random.default_rng(1)
    count = options.window * (options.rounds + 2)
    rows = [
        {
            "title": f"article {number}",
            "text": "",
            "tokens": random.integers(0, vocabulary, count).tolist(),
            "words": list(range(count)),
            "num_words": count,
        }
        for number in range(options.rows)
    ]
    return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))


class PlainModel(nn.Module):
    """The same model, written on the layers of torch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [config.hidden_size] * (config.num_layers - 1) + [config.embedding_size]
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_size)
        inputs = [config.embedding_size, *sizes[:-1]]
        self.layers = nn.ModuleList(nn.LSTM(*both) for both in zip(inputs, sizes, strict=True))
        self.decoder = nn.Linear(config.embedding_size, config.vocabulary_size)
        self.decoder.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, state: list[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        """Logits [time, rows, vocabulary] of int64 [time, rows], and the next state."""
        config = self.config
        weight = self.embedding.weight
        if config.embedding_dropout > 0:
            keep = 1 - config.embedding_dropout
            weight = weight * weight.new_empty(len(weight), 1).bernoulli_(keep).div_(keep)
        values = nn.functional.embedding(tokens, weight)
        values = locked_dropout(values, config.input_dropout, True)
        after: list[tuple[Tensor, Tensor] | None] = []
        for place, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            values, found = layer(values, before)
            after.append((found[0].detach(), found[1].detach()))
            last = place == len(state) - 1
            share = config.output_dropout if last else config.hidden_dropout
            values = locked_dropout(values, share, True)
        return self.decoder(values), after


def plain_step(
    model: PlainModel, articles: ArticleSet, recipe: BaseTrainingConfig
) -> Callable[[], None]:
    """A training step without anything that metalm adds."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=0.0
    )
    text = torch.stack(
        [torch.from_numpy(articles[n].tokens.astype(np.int64)) for n in range(len(articles))], 1
    )
    state: list[tuple[Tensor, Tensor] | None] = [None] * len(model.layers)
    start = 0

    def step() -> None:
        nonlocal state, start
        part = text[start : start + recipe.window + 1]
        start += recipe.window
        with reduced_products(text.device, recipe.bfloat16):
            logits, state = model(part[:-1], state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        loss.item()

    return step


def numbered(step: Callable[[int], object]) -> Callable[[], None]:
    """The next step at each call."""
    index = 0

    def take() -> None:
        nonlocal index
        step(index)
        index += 1

    return take


def take_turns(steps: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each step, in turns, after one warm-up round."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, column in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if number > 0:
                column.append(time.perf_counter() - start)
    return times


def ratio(times: list[float], others: list[float]) -> str:
    """The median of the ratios of pairs, and their range."""
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
