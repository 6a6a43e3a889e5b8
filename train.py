"""Train a language model that learns while it reads, and compare it with its rivals.

    python train.py                              # the embedded default: the documentation inside
                                                 # Python, four minutes
    python train.py --data wikitext-2            # WikiText-2 from the hub, preset small: less than
                                                 # three hours of training, then the evaluation
    python train.py --data FOLDER                # wiki.*.tokens files, or your own .txt or .md
                                                 # articles; or one .jsonl file of articles
    python train.py --preset small --dry-run     # print the resolved configuration
    python train.py fewshot --help               # few-shot learning instead
    torchrun --nproc-per-node 2 -- train.py ...  # two processes share the rows of every batch, and
                                                 # the articles; accelerate launch does it too

Everything goes into one folder under runs/. The same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from data_prep.corpora import prepare_as
from data_prep.picture_corpora import prepare_pictures
from metalm.fewshot import command_line
from metalm.language.run.experiment import evaluate, train
from metalm.language.run.presets import PRESETS, ExperimentConfig, preset_named
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.stages import STAGES, refuse_unknown
from metalm.language.text.articles import Corpus, open_corpus
from metalm.training.allocator import keep_freed_memory
from metalm.training.devices import use_device
from metalm.training.disk import writing
from metalm.training.folder_lock import only_program_in
from metalm.training.precision import refuse_emulated_bfloat16
from metalm.training.processes import first_alone, is_first, refuse_several, together


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: wrong input, or a refusing disk)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["fewshot"]:
        return train_few_shot(arguments[1:])
    options, overrides = parse(arguments)
    try:
        refuse_unknown(options.stages)
        config = configure(options, overrides)
        with together():
            if is_first():
                print(json.dumps(dataclasses.asdict(config), indent=2))
            if not options.dry_run:
                run(config, options, "python train.py " + shlex.join(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train_few_shot(arguments: Sequence[str]) -> int:
    """The same for few-shot methods."""
    keep_freed_memory()
    try:
        refuse_several("few-shot learning")
        return command_line.run(arguments, prepare_pictures)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and what is left for the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any setting may follow: --seed 3, --device cuda, --threads 1; a nested one as\n"
        "--model.hidden-size 512, a switch as --tuning.flush / --tuning.no-flush (--dry-run\n"
        "prints them all, with _ where an option has -).",
    )
    parser.add_argument(
        "--preset", help=f"one of {', '.join(PRESETS)} (default: tiny for python-docs, else small)"
    )
    parser.add_argument("--data", help="name of a corpus, or path of a folder or .jsonl file")
    parser.add_argument("--run", help="folder of the run (default: runs/ and the name of the data)")
    parser.add_argument(
        "--stages",
        nargs="*",
        default=list(STAGES),
        help=f"trainings to run (default: {' '.join(STAGES)})",
    )
    parser.add_argument("--no-evaluation", action="store_true", help="train only")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    return parser.parse_known_args(arguments)


def configure(options: argparse.Namespace, overrides: Sequence[str]) -> ExperimentConfig:
    """The resolved configuration: preset, then --data, then the overrides.

    Raises:
        ValueError: an unknown preset, or a size of the vocabulary for the model alone.
    """
    embedded = options.data in (None, "python-docs")
    config = preset_named(options.preset or ("tiny" if embedded else "small"))
    if options.data is not None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, source=options.data)
        )
    found = tyro.cli(ExperimentConfig, args=list(overrides), default=config, prog="python train.py")
    if found.model.vocabulary_size != config.model.vocabulary_size:
        raise ValueError(
            "the model has the vocabulary of its data; expected --data.vocabulary-size, found "
            f"--model.vocabulary-size {found.model.vocabulary_size}; use the former"
        )
    model = dataclasses.replace(found.model, vocabulary_size=found.data.vocabulary_size)
    return dataclasses.replace(found, model=model)


def open_data(config: ExperimentConfig) -> tuple[ExperimentConfig, Corpus]:
    """The corpus, prepared if need be, and the configuration with its vocabulary's size."""
    corpus = open_corpus(first_alone(lambda: prepare_as(config.data)))
    model = dataclasses.replace(config.model, vocabulary_size=corpus.vocabulary.size)
    return dataclasses.replace(config, model=model), corpus


def run(config: ExperimentConfig, options: argparse.Namespace, command: str) -> None:
    """Prepares the data, trains, evaluates and reports."""
    use_device(config.device)
    if config.evaluation.bfloat16 and not options.no_evaluation:
        refuse_emulated_bfloat16(config.device)
    keep_freed_memory()
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    config, corpus = open_data(config)
    folder = LanguageRunFolder(
        options.run or Path("runs") / Path(config.data.source).resolve().name
    )
    with only_program_in(folder.folder), writing(folder.folder):
        train(config, corpus, folder, options.stages)
        if not options.no_evaluation:
            report = evaluate(config, corpus, folder, command=command)
            if is_first():
                print(f"report: {report}")


if __name__ == "__main__":
    sys.exit(main())
