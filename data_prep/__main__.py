"""Prepare a corpus: python -m data_prep NAME_OR_PATH --out DIR --tokenizer bpe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from data_prep.corpora import NAMED, prepare
from metalm.language.text.articles import open_corpus
from metalm.language.text.vocabulary import Kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare one corpus and print what it holds; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    parser.add_argument(
        "source",
        help=f"one of {', '.join(NAMED)}; a folder with WikiText files; a folder with .txt "
        "or .md files; or a .jsonl file",
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of prepared corpora")
    parser.add_argument("--tokenizer", choices=get_args(Kind), default="bpe")
    parser.add_argument(
        "--vocabulary-size",
        type=int,
        default=6000,
        help="entries of a byte-pair vocabulary, the end of line included",
    )
    options = parser.parse_args(arguments)
    try:
        folder = prepare(
            options.source,
            tokenizer=options.tokenizer,
            vocabulary_size=options.vocabulary_size,
            root=options.out,
        )
        corpus = open_corpus(folder)
    except ValueError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {corpus.vocabulary.kind} vocabulary of {corpus.vocabulary.size:,}")
    for split, counts in corpus.manifest["splits"].items():
        print(
            f"  {split:5} {counts['articles']:>7,} articles {counts['words']:>12,} words "
            f"{counts['tokens']:>12,} tokens"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
