"""Score a trained run: every method on every article, tables and plots.

    python evaluate.py runs/python-docs                         # the test articles of its own data
    python evaluate.py runs/python-docs --split valid
    python evaluate.py runs/python-docs --tune                  # only choose settings
    python evaluate.py runs/wikitext-2 --bfloat16               # quicker, nearly the same numbers
    python evaluate.py runs/wikitext-2 --data FOLDER            # other text, with its tokenizer
    python evaluate.py runs/wikitext-2 --text FILE ...          # any .txt or .md files, at once
    python evaluate.py --text FILE ...                          # with the model of the package
    python evaluate.py runs/glyphs-5-way-1-shot/maml            # a few-shot method
    torchrun --nproc-per-node 2 -- evaluate.py runs/wikitext-2  # two processes share the articles

Settings are tuned on validation articles of the run's own data, once, before anything is scored.
The report is a page, report.html, that opens in any browser, offline.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.own_text import read_texts
from data_prep.wikitext_form import in_wikitext_form, is_in_wikitext_form
from metalm.language.own_texts import evaluate_texts, reader_of_pretrained, reader_of_run
from metalm.language.run.experiment import MODES, SPLITS, evaluate, tune_run
from metalm.language.run.opened_run import open_run
from metalm.language.run.presets import EvaluationConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.text.articles import open_corpus
from metalm.training.allocator import keep_freed_memory
from metalm.training.devices import use_device
from metalm.training.disk import writing
from metalm.training.folder_lock import only_program_in
from metalm.training.precision import refuse_emulated_bfloat16
from metalm.training.processes import first_alone, is_first, refuse_several, together


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: wrong input, or a refusing disk)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    try:
        with together():
            written = run(options, "python evaluate.py " + shlex.join(arguments))
            if is_first():
                print(written)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run",
        nargs="?",
        help="folder that train.py wrote; for --text also a saved model (default: the package's)",
    )
    parser.add_argument("--data", help="another corpus (name or path); default: the run's own")
    parser.add_argument("--split", choices=SPLITS, help="which articles are scored (default: test)")
    parser.add_argument(
        "--tune", action="store_true", help="choose settings on validation articles and stop"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="reading modes (default: both)")
    parser.add_argument(
        "--temperatures",
        nargs="+",
        type=float,
        help="score once more under a temperature of the softmax that validation chooses of these",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="processor threads (default: the run's; one where one text is read at a time)",
    )
    parser.add_argument("--device", help="where tensors live (default: where the run was trained)")
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        help="score with matrix products in bfloat16, under names of its own (default: as the run "
        "was asked to); settings are tuned in float32",
    )
    parser.add_argument(
        "--official-runs",
        type=Path,
        help="Omniglot's one-shot challenge, for a few-shot run (without one: the baseline)",
    )
    parser.add_argument("--text", nargs="+", type=Path, help="score these .txt or .md files")
    parser.add_argument(
        "--as-written",
        action="store_true",
        help="leave the text as it is (default: punctuation apart and a line a paragraph, as in "
        "WikiText, for models that were trained there)",
    )
    parser.add_argument("--out", type=Path, help="where the report of --text goes")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if options.text is None:
        if options.run is None and options.official_runs is None:
            parser.error("which run? expected a folder that train.py wrote")
        if options.out is not None:
            parser.error("--out goes with --text; other reports lie in the run's folder")
        if options.as_written:
            parser.error("--as-written goes with --text; a corpus is read as it was prepared")
        if options.tune and options.bfloat16:
            parser.error("--bfloat16 is for scores; settings are tuned in float32: leave it out")
        return
    others = ("data", "split", "tune", "modes", "temperatures", "official_runs")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(options, name)]
    if given:
        parser.error(f"--text reads files as they are; it does not go with {', '.join(given)}")


def run(options: argparse.Namespace, command: str) -> Path | str:
    """Loads the run and its data, and evaluates; returns the report, or the run once tuned."""
    keep_freed_memory()
    if options.text is not None:
        return run_texts(options, command)
    if options.run is None:
        return run_few_shot(options)
    folder = LanguageRunFolder(options.run)
    if "scoring" in folder.read_configuration():
        return run_few_shot(options)
    if options.official_runs is not None:
        raise ValueError(
            "--official-runs is for few-shot methods; expected a run of train.py fewshot, found "
            f"{folder.folder}; leave the option out"
        )
    # Imported late: it takes half a second, and single texts are read without it.
    from data_prep.corpora import prepare_as

    if options.device is not None:
        use_device(options.device)
    opened = open_run(options.run, lambda data: first_alone(lambda: prepare_as(data)))
    config, own = opened.config, opened.corpus
    config = dataclasses.replace(config, device=options.device or config.device)
    use_device(config.device)
    config = dataclasses.replace(config, evaluation=evaluation_of(options, config.evaluation))
    if config.evaluation.bfloat16 and not options.tune:
        refuse_emulated_bfloat16(config.device)
    threads = options.threads or config.threads
    if threads > 0:
        torch.set_num_threads(threads)
    other = None
    if options.data is not None:
        words = own.vocabulary
        other = open_corpus(first_alone(lambda: prepare_as(config.data, options.data, words)))
    with only_program_in(folder.folder), writing(folder.folder):
        if options.tune:
            tune_run(config, own, folder, options.modes)
            return folder.folder
        return evaluate(
            config,
            own,
            folder,
            split=options.split or "test",
            modes=options.modes,
            command=command,
            other=other,
        )


def evaluation_of(options: argparse.Namespace, own: EvaluationConfig) -> EvaluationConfig:
    """The run's own evaluation, with what the command line asks for instead."""
    if options.temperatures:
        own = dataclasses.replace(own, temperatures=tuple(options.temperatures))
    if options.bfloat16 is not None:
        own = dataclasses.replace(own, bfloat16=options.bfloat16)
    return own


def run_few_shot(options: argparse.Namespace) -> str:
    """Scores a few-shot method, or the baseline of the official challenge; returns the scores."""
    refuse_several("few-shot learning")
    given = [name for name in ("data", "tune", "modes", "temperatures") if getattr(options, name)]
    given += ["split"] if options.split not in (None, "test") else []
    given += ["bfloat16"] if options.bfloat16 is not None else []
    if given:
        raise ValueError(
            "few-shot methods are scored on their test tasks; expected --official-runs, --device "
            f"or --threads, found {', '.join(f'--{name}' for name in given)}; leave it out"
        )
    # Imported late, like what reads texts: neither waits for the other.
    from data_prep.picture_corpora import prepare_pictures
    from metalm.fewshot import command_line

    folder = None if options.run is None else LanguageRunFolder(options.run)
    return command_line.evaluate(
        folder,
        prepare_pictures,
        options.official_runs,
        threads=options.threads,
        device=options.device,
    )


def run_texts(options: argparse.Namespace, command: str) -> Path:
    """Reads single files with a run's models, or with a saved one; returns the page."""
    refuse_several("reading single files")
    texts = [(article.title, article.text) for article in read_texts(options.text)]
    name = re.sub(r"[^\w.-]+", "-", options.text[0].stem)
    name += f"-and-{len(texts) - 1}-more" if len(texts) > 1 else ""
    is_run = options.run is not None and (Path(options.run) / "configuration.json").exists()
    reader = (
        reader_of_run(LanguageRunFolder(options.run), options.device, options.bfloat16)
        if is_run
        else reader_of_pretrained(
            options.run or "shipped", options.device, options.bfloat16 is True
        )
    )
    # One text at a time gains nothing from a second thread, and loses much where the cores are
    # busy: the products are small and the threads wait for each other thousands of times a second.
    one_row = min(reader.rows, len(texts)) == 1
    threads = options.threads or (1 if one_row else 0)
    if threads > 0:
        torch.set_num_threads(threads)
    name += "-bfloat16" if reader.bfloat16 else ""
    folder = (Path(options.run) if is_run else Path()) / f"report-text-{name}"
    folder = options.out or folder
    texts, notes = formed(texts, reader.corpus, options.as_written)
    with only_program_in(folder), writing(folder):
        return evaluate_texts(reader, texts, folder, command=command, notes=notes)


def formed(
    texts: list[tuple[str, str]], corpus: str, as_written: bool
) -> tuple[list[tuple[str, str]], list[str]]:
    """The texts in the form of the corpus, if it is WikiText, and what is to be said of that."""
    if as_written or not corpus.startswith("wikitext"):
        return texts, []
    changed = [title for title, text in texts if not is_in_wikitext_form(text)]
    if not changed:
        return texts, []
    note = (
        "Punctuation stands apart and a paragraph is a line, as in WikiText, where the model was "
        f"trained ({len(changed)} of {len(texts)} texts); --as-written leaves them as they are."
    )
    print(note, file=sys.stderr)
    return [(title, in_wikitext_form(text)) for title, text in texts], [note]


if __name__ == "__main__":
    sys.exit(main())
