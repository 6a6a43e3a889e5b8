"""Score a trained run: every method on every article, tables and plots.

    python evaluate.py runs/python-docs                         # the test articles of its own data
    python evaluate.py runs/python-docs --split valid
    python evaluate.py runs/python-docs --tune                  # only choose settings
    python evaluate.py runs/wikitext-2 --data FOLDER            # other text, with its tokenizer

Settings are tuned on validation articles of the run's own data, once, before anything is scored.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.corpora import prepare
from metalm.language.articles import open_corpus
from metalm.language.configuration import from_json
from metalm.language.experiment import MODES, SPLITS, evaluate, tune_run
from metalm.language.presets import ExperimentConfig
from metalm.language.run_folder import RunFolder
from metalm.language.vocabulary import Vocabulary
from metalm.training.allocator import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: the input was wrong)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    try:
        written = run(options, "python evaluate.py " + shlex.join(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("--data", help="another corpus (name or path); default: the run's own")
    parser.add_argument("--split", default="test", choices=SPLITS, help="which articles are scored")
    parser.add_argument(
        "--tune", action="store_true", help="choose settings on validation articles and stop"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="reading modes (default: both)")
    parser.add_argument(
        "--threads", type=int, default=0, help="processor threads (default: torch's choice)"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: str) -> Path:
    """Loads the run and its data, and evaluates; returns the report, or the run once tuned."""
    keep_freed_memory()
    folder = RunFolder(options.run)
    config = from_json(ExperimentConfig, folder.read_configuration())
    threads = options.threads or config.threads
    if threads > 0:
        torch.set_num_threads(threads)
    own = open_corpus(prepare_data(config, config.data.source))
    vocabulary = Vocabulary.load(folder.vocabulary_path)
    if vocabulary.checksum != own.vocabulary.checksum:
        raise ValueError(
            f"{own.folder} has another vocabulary than {folder.folder}; expected the one that the "
            "run was trained with; prepare the run's own data again, or restore it"
        )
    if options.tune:
        tune_run(config, own, folder, options.modes)
        return folder.folder
    other = None
    if options.data is not None:
        other = open_corpus(prepare_data(config, options.data, vocabulary))
    return evaluate(
        config,
        own,
        folder,
        split=options.split,
        modes=options.modes,
        command=command,
        other=other,
    )


def prepare_data(
    config: ExperimentConfig, source: str, vocabulary: Vocabulary | None = None
) -> Path:
    """The prepared folder of a corpus, with the run's own vocabulary if one is given."""
    return prepare(
        source,
        tokenizer=config.data.tokenizer,
        vocabulary_size=config.data.vocabulary_size,
        root=Path(config.data.root),
        vocabulary=vocabulary,
    )


if __name__ == "__main__":
    sys.exit(main())
