"""Tokens per second and peak memory of preparing a corpus of any size, from text to opened folder.

    python benchmarks/prepare_tokens.py [--tokens 100_000_000] [--tokenizer bpe] [--out FOLDER]

The text is synthetic (data_prep/synthetic.py), made while it is read, so that nothing but the
prepared corpus is ever on the disk: about 13 bytes a token, twice that while a split is finished.
It is removed at the end. The peak is that of the resident memory of the whole process, mapped
pages of files included.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import get_args

from data_prep.prepared import write
from data_prep.synthetic import SyntheticText, synthetic_source
from metalm.language.text.articles import open_corpus
from metalm.language.text.vocabulary import Kind
from metalm.training.memory import peak_memory, reset_peak_memory

# "NAME verb NAME ." and the end of line, each one token where the vocabulary has all names.
TOKENS_OF_A_LINE = 5


def main() -> None:
    """Prepares, opens, prints and removes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--tokenizer", choices=get_args(Kind), default="bpe")
    parser.add_argument("--vocabulary-size", type=int, default=6000)
    parser.add_argument("--names", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=1000, help="of each article")
    parser.add_argument("--out", type=Path, help="an existing folder (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        measure(options, Path(folder) / "corpus")


def measure(options: argparse.Namespace, folder: Path) -> None:
    """One preparation and one opening."""
    print(options)
    articles = max(3, options.tokens // (TOKENS_OF_A_LINE * options.lines))
    held_out = max(1, articles // 100)
    settings = SyntheticText(
        num_names=options.names,
        cast_size=20,
        num_lines=options.lines,
        num_articles={"train": articles - 2 * held_out, "valid": held_out, "test": held_out},
    )
    reset_peak_memory()
    clock, worked = time.perf_counter(), time.process_time()
    source = synthetic_source(settings)
    manifest = write(source, folder, options.tokenizer, options.vocabulary_size)
    _report("prepared", clock, worked, sum(c["tokens"] for c in manifest["splits"].values()))
    print(f"on disk: {sum(entry['bytes'] for entry in manifest['files'].values()) / 2**20:.0f} MiB")
    reset_peak_memory()
    clock, worked = time.perf_counter(), time.process_time()
    corpus = open_corpus(folder)
    found = sum(split.num_tokens for split in (corpus.train, corpus.valid, corpus.test))
    _report("opened, checksums compared", clock, worked, found)
    shutil.rmtree(folder)


def _report(what: str, clock: float, worked: float, tokens: int) -> None:
    seconds, busy = time.perf_counter() - clock, time.process_time() - worked
    peak = peak_memory()
    memory = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
    print(
        f"{what}: {tokens:,} tokens in {seconds:.1f} s ({busy:.1f} s of the processor): "
        f"{tokens / seconds:,.0f} tokens/s, {tokens / busy:,.0f} a second of the processor; "
        f"peak memory {memory}",
        flush=True,
    )


if __name__ == "__main__":
    main()
