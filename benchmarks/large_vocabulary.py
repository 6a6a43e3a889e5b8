"""The vocabulary and the amount of WikiText-103 on generated text: prepared, trained on, read.

    python benchmarks/large_vocabulary.py [--tokens 3_000_000] [--full-softmax] [--out FOLDER]

The text has as many words as WikiText-103 (267,735 with the end of line) and, with `--tokens
103_000_000`, as many tokens: then about 1.6 GB on the disk, removed at the end. Each stage takes a
few steps of the real trainings, then an article is read with fast weights: tokens per second, and
per second of the processor where others share it, each the median over steps after the first; and
the peak memory of the process, mapped pages of files included. What is not mapped (RssAnon) is
printed too, so that it shows whether the text stays in its file. `--full-softmax` leaves out the
clusters, for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_prep.prepared import write
from data_prep.text_source import TextArticle, TextSource
from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.reading.reader import Reader
from metalm.language.run.presets import wikitext_103
from metalm.language.text.articles import SPLITS, Corpus, open_corpus
from metalm.language.training.base_training import BaseTraining, BaseTrainingConfig
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import (
    JointTrainingConfig,
    RuleTrainingConfig,
    starting_rule,
)
from metalm.language.training.statistics import gradient_rms, token_counts
from metalm.meta.parameters import choose, split
from metalm.training.allocator import keep_freed_memory
from metalm.training.memory import peak_memory, reset_peak_memory

WORDS = 267_734
# Of the mean article of WikiText-103, and of a line of it (103,227,021 tokens, 28,475 articles,
# 1.8 % ends of line).
TOKENS_OF_AN_ARTICLE, TOKENS_OF_A_LINE = 3625, 55
# Frequencies fall as 1 / rank to this rank, then with this exponent, so that of 103 million tokens
# the rarest word has about three, as in WikiText-103.
KNEE, TAIL_EXPONENT = 10_000, 1.75
# Share of tokens that repeat one of those before them in the article, which leaves all frequencies
# as they are and gives fast weights something to learn.
REPEATED = 0.3


@dataclass(frozen=True, kw_only=True)
class ZipfText:
    """How much text."""

    articles: int
    """Of the training split."""
    seed: int = 0
    """Of everything."""


def zipf_source(settings: ZipfText) -> TextSource:
    """Articles of random words with frequencies like those of natural text; each repeats itself.

    The validation split is a list of all words, so that a small text has them all too.
    """
    ranks = np.arange(1, WORDS + 1)
    weights = np.where(ranks <= KNEE, 1 / ranks, KNEE ** (TAIL_EXPONENT - 1) / ranks**TAIL_EXPONENT)
    ends = np.cumsum(weights / weights.sum())
    words = np.array([f"{rank:x}" for rank in ranks])
    counts = {"train": settings.articles, "test": 60}

    def random_articles(split: str) -> Iterator[TextArticle]:
        for number in range(counts[split]):
            random = np.random.default_rng([settings.seed, SPLITS.index(split), number])
            drawn = np.searchsorted(ends, random.random(TOKENS_OF_AN_ARTICLE)).clip(0, WORDS - 1)
            again = np.flatnonzero(random.random(len(drawn)) < REPEATED)
            drawn[again] = drawn[(again * random.random(len(again))).astype(np.int64)]
            yield TextArticle(f"{split} {number}", _lines(words[drawn]))

    def all_words() -> Iterator[TextArticle]:
        parts = np.array_split(words, WORDS // TOKENS_OF_AN_ARTICLE)
        for number, part in enumerate(parts):
            yield TextArticle(f"words {number}", _lines(part))

    splits = {split: partial(random_articles, split) for split in counts}
    return TextSource(
        name="zipf",
        identity={"from": "zipf", **asdict(settings)},
        splits={**splits, "valid": all_words},
        closed=True,
    )


def _lines(words: np.ndarray) -> str:
    length = TOKENS_OF_A_LINE - 1
    lines = (words[start : start + length] for start in range(0, len(words), length))
    return "".join(" ".join(line) + "\n" for line in lines)


def main() -> None:
    """Prepares, opens, trains, reads, prints and removes."""
    preset = wikitext_103()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--cell", choices=("lstm", "qrnn"), default="lstm")
    parser.add_argument("--embedding-size", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--preset-sizes", action="store_true", help="those of wikitext-103")
    parser.add_argument("--full-softmax", action="store_true", help="no clusters")
    parser.add_argument("--rows", type=int, default=16, help="of the base")
    parser.add_argument("--window", type=int, default=64, help="of the base")
    parser.add_argument("--meta-rows", type=int, default=4)
    parser.add_argument("--unroll", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of each training")
    parser.add_argument("--read", type=int, default=1000, help="tokens of the article")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="an existing folder (default: the system's)")
    options = parser.parse_args()
    print(options)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    config = preset.model
    if not options.preset_sizes:
        config = ModelConfig(
            vocabulary_size=config.vocabulary_size,
            cell=options.cell,
            embedding_size=options.embedding_size,
            hidden_size=options.hidden_size,
            num_layers=options.layers,
            cutoffs=() if options.full_softmax else config.cutoffs,
            shrink=config.shrink,
        )
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        corpus = prepare(options.tokens, Path(folder) / "corpus")
        train_and_read(options, config, corpus)


def prepare(tokens: int, folder: Path) -> Corpus:
    """Writes the text and opens it."""
    settings = ZipfText(articles=max(1, tokens // TOKENS_OF_AN_ARTICLE))
    with _Measured("prepared") as measured:
        manifest = write(zipf_source(settings), folder, "word", 0)
        measured.tokens = sum(counts["tokens"] for counts in manifest["splits"].values())
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"on disk: {size / 2**20:.0f} MiB, {manifest['tokenizer']['size']:,} words")
    with _Measured("opened, checksums compared") as measured:
        corpus = open_corpus(folder)
        measured.tokens = corpus.train.num_tokens + corpus.valid.num_tokens + corpus.test.num_tokens
    return corpus


def train_and_read(options: argparse.Namespace, config: ModelConfig, corpus: Corpus) -> None:
    """A few steps of each training, then an article."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with _Measured("token frequencies counted") as measured:
        counts = token_counts(corpus.train, config.vocabulary_size)
        measured.tokens = corpus.train.num_tokens
    shares = [float(counts[part].sum() / counts.sum()) for part in _clusters(config)]
    print(f"shares of the clusters: {', '.join(f'{share:.3f}' for share in shares)}")
    model.start_from_frequencies(counts)
    model.to(options.device)
    print(f"parameters: {sum(weight.numel() for weight in model.parameters()):,}")

    def constant(_: int) -> float:
        return 1.0

    base = BaseTrainingConfig(rows=options.rows, window=options.window, learning_rate=1e-3)
    training = BaseTraining(model, corpus.train, base, constant, 0)
    _steps("base", options.steps, training.step)

    recipe = RuleTrainingConfig(rows=options.meta_rows, unroll=options.unroll)
    names = choose(model, recipe.adapt)
    fast, _ = split(model, names)
    with _Measured("gradient statistics, 2 batches") as measured:
        rms = gradient_rms(model, corpus.train, names, recipe.segment, rows=16, batches=2)
        measured.tokens = 2 * 16 * recipe.segment
    rule = starting_rule(rms, recipe).to(options.device)
    print(f"fast weights of an article: {sum(weight.numel() for weight in fast.values()):,}")
    meta = partial(MetaTraining, model, rule, names, corpus.train)
    _steps("rule", options.steps, meta(recipe, constant, 0).step)
    joint = JointTrainingConfig(rows=options.meta_rows, unroll=options.unroll)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(training.optimizer.state_dict())
    together = meta(joint, constant, 1, optimizer, lambda _: 1e-3)
    _steps("joint", options.steps, together.step)

    model.requires_grad_(False)
    rule.requires_grad_(False)
    tokens = corpus.test[0].tokens[: options.read]
    for name, learner in (("static", None), ("with fast weights", rule)):
        with _Measured(f"an article read, {name}") as measured:
            reader = Reader(model, learner, names if learner else (), recipe.segment)
            readings = reader.read([tokens])
            measured.tokens = readings.num_tokens
        print(f"  {readings.total / readings.num_tokens:.3f} nats a token", flush=True)


def _clusters(config: ModelConfig) -> Iterator[slice]:
    for ends in itertools.pairwise((0, *config.cutoffs, config.vocabulary_size)):
        yield slice(*ends)


def _steps(name: str, steps: int, step: Callable[[int], dict[str, float]]) -> None:
    """Steps of a training; the first of them warms up."""
    reset_peak_memory()
    speeds, losses = [], []
    for index in range(steps):
        clock, worked = time.perf_counter(), time.process_time()
        values = step(index)
        passed = np.array([time.perf_counter() - clock, time.process_time() - worked])
        speeds.append(values["tokens"] / passed)
        losses.append(values["loss"])
    (wall, least, most), (busy, *_) = (
        (statistics.median(column), min(column), max(column))
        for column in np.array(speeds[1:]).T.tolist()
    )
    print(
        f"{name}: median of {steps - 1} steps {wall:,.0f} tokens/s ({least:,.0f} to {most:,.0f}), "
        f"{busy:,.0f} a second of the processor; loss {losses[0]:.3f} to {losses[-1]:.3f}; "
        f"{_memory()}",
        flush=True,
    )


class _Measured:
    """Prints the time, the tokens a second and the memory of a stretch of work."""

    def __init__(self, what: str) -> None:
        self.what, self.tokens = what, 0

    def __enter__(self) -> _Measured:
        reset_peak_memory()
        self.clock, self.worked = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        seconds, busy = time.perf_counter() - self.clock, time.process_time() - self.worked
        print(
            f"{self.what}: {self.tokens:,} tokens in {seconds:.1f} s ({busy:.1f} s of the "
            f"processor): {self.tokens / seconds:,.0f} tokens/s, {self.tokens / busy:,.0f} a "
            f"second of the processor; {_memory()}",
            flush=True,
        )


def _memory() -> str:
    peak = peak_memory()
    parts = ["peak memory unknown" if peak is None else f"peak memory {peak / 2**20:,.0f} MiB"]
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line.split() for line in status.read_text().splitlines()]
        own = next((int(line[1]) for line in lines if line[0] == "RssAnon:"), 0)
        parts.append(f"now {own / 2**10:,.0f} MiB not mapped")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
