"""What the base of a run says of the text, static, as one stream: the figure that papers report.

    python benchmarks/base_perplexity.py RUN [--split valid] [--device cpu]

The base alone, before control and joint go on from it: ``train.py ... --stages base`` is enough.
Articles stand in their own order and the hidden state goes through; nothing is learnt while
reading, and the temperature is 1. Printed: perplexity per token and per word, and how long the base
was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from data_prep.corpora import prepare_as
from metalm.language.run.opened_run import open_run
from metalm.language.run.trained import load_model
from metalm.language.text.streams import TokenStreams
from metalm.language.training.stream_loss import stream_loss


def main() -> None:
    """Reads and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--device", help="another one than the run's, such as cpu or cuda")
    options = parser.parse_args()
    opened = open_run(options.run, prepare_as)
    config = dataclasses.replace(opened.config, device=options.device or opened.config.device)
    model = load_model(opened.folder, "base", config)
    articles = getattr(opened.corpus, options.split)
    text = TokenStreams(articles, 1, 0, 0, shuffled=False)
    nats = stream_loss(model, dict(model.named_parameters()), text, window=200)
    words = nats * text.length / articles.num_words
    print(
        f"{options.split}: {text.length:,} tokens, {articles.num_words:,} words; static base: "
        f"{math.exp(nats):.2f} per token, {math.exp(words):.2f} per word"
    )
    print(f"parameters: {sum(each.numel() for each in model.parameters()):,}")
    seconds = trained_seconds(options.run / "stages" / "base" / "metrics.jsonl")
    print(f"trained for {seconds / 60:.1f} minutes, its evaluations left out")


def trained_seconds(path: Path) -> float:
    """Seconds of training when the last record was written, those before a restart included."""
    last = path.read_text().splitlines()[-1]
    return float(json.loads(last)["seconds"])


if __name__ == "__main__":
    main()
