"""Long-term memory: do later articles start better when earlier ones are consolidated into W_0?

    python benchmarks/consolidation.py runs/wikitext-2 [--out FOLDER] [--tokens 1000]

Articles are read one after the other with metalm (reset: the fast weights of each begin at W_0),
and W_0 is consolidated between them. Two things are measured, always against no consolidation:

1. the beginnings of articles (first 200, 500, 1000 tokens), each token scored before anything is
   learnt from it; apart for articles with an earlier one on a related subject (tf-idf cosine of at
   least `--related`, on the texts alone) and those without;
2. forgetting: articles that were not among those read, re-read static with the consolidated W_0.

The held-out training articles (which the base has not read; the joint training has, about once)
are dealt out in turn to A and B. Share and elasticity are chosen on A: by its beginnings read
static, before anything is learnt from them, among the settings that do not make B worse when that
is re-read static. For this every article of A is read once, from home, and taken to go as far from
any other W_0; what is shown takes no such short cut. B and the validation articles are then read in
one succession: shown are their beginnings, and forgetting on the validation articles after B,
before any of them was read. A run that was interrupted goes on where it was (results.json).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from data_prep.corpora import prepare_as
from metalm.adapt.reading_state import checksum
from metalm.analysis.consolidation_report import consolidation_table, draw_consolidation
from metalm.analysis.figures.appearance import SETTINGS, save_figure
from metalm.language.memory.consolidation import ConsolidationConfig, LongTermMemory
from metalm.language.memory.consolidation_effect import Effect, Found, Succession
from metalm.language.memory.consolidation_tuning import (
    ChoiceText,
    ConsolidationTrial,
    choose_consolidation,
    try_settings,
)
from metalm.language.memory.fisher import kept_fisher, spread
from metalm.language.own_texts import reader_of_run
from metalm.language.reading.methods import NAMES
from metalm.language.reading.reader import Reader
from metalm.language.run.opened_run import OpenedRun, open_run
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.text.articles import Article, Corpus
from metalm.meta.parameters import Parameters
from metalm.training.allocator import keep_freed_memory
from metalm.training.disk import write_at_once

BEGINNINGS = (200, 500, 1000)
CHOSEN_BY = 500
SHOWN_BY = 1000
NUM_OLD = 30
"""Articles that every training read, re-read for what is forgotten of them."""


def main() -> None:
    """Chooses on A, shows on the rest, and writes results.json, a table and a plot."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    run = open_run(options.run, prepare_as)
    out = options.out or run.folder.folder / "consolidation"
    out.mkdir(parents=True, exist_ok=True)
    reader, settings = load_metalm(run.folder)
    print("metalm:", settings, flush=True)
    text, succession = deal_out(run, options)
    fisher = fisher_of(reader, run.corpus, out / "fisher.safetensors", options.batches)
    results = begin(out, options, reader, settings)
    results["fisher"] = spread(fisher)
    print("Fisher, quantiles in units of its mean:", results["fisher"], flush=True)

    trials = try_all(reader, fisher, text, options, results, out)
    conditions = choose_consolidation(trials)
    results["chosen"] = {name: vars(setting) for name, setting in conditions.items()}
    print("chosen:", results["chosen"], flush=True)
    show(Effect(reader, fisher, succession), conditions, results, out)
    shown = {name: results["shown"][name] for name in conditions}
    found = (shown, results["groups"], BEGINNINGS)
    print(consolidation_table(*found), flush=True)
    (out / "table.md").write_text(consolidation_table(*found), encoding="utf-8")
    with matplotlib.rc_context(SETTINGS):
        save_figure(draw_consolidation(*found), out / "consolidation")


def parse() -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with a joint training")
    parser.add_argument("--out", type=Path, help="default: consolidation/ in the run's folder")
    parser.add_argument("--tokens", type=int, default=1000, help="read of each article")
    parser.add_argument("--static-tokens", type=int, default=10**9, help="re-read of each")
    parser.add_argument("--articles", type=int, default=10**9, help="of each set, at most")
    parser.add_argument("--related", type=float, default=0.15, help="tf-idf cosine from which on")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument(
        "--elasticities", type=float, nargs="+", default=[0.0, 0.01, 0.03, 0.1, 1.0]
    )
    parser.add_argument("--batches", type=int, default=600, help="of the Fisher's estimate")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def load_metalm(folder: LanguageRunFolder) -> tuple[Reader, dict[str, Any]]:
    """The joint model and its rule, as tuned for the reset mode."""
    found = reader_of_run(folder)
    (method,) = (m for m in found.methods if m.name == NAMES["joint"])
    models = found.models
    names = models.fast_names(method)
    reader = Reader(models.model(method), models.rule(method), names, method.segment)
    return reader, {"segment": method.segment, **method.settings}


def deal_out(run: OpenedRun, options: argparse.Namespace) -> tuple[ChoiceText, Succession]:
    """Held-out articles in turn to A and B; validation; thirty that all trainings read."""
    stages, most = run.stages, options.articles
    held_out: list[Article] = list(stages.held_out_articles)
    old = np.random.default_rng(0).permutation(len(stages.base_articles))[:NUM_OLD]
    show = held_out[1::2][:most]
    text = ChoiceText(held_out[0::2][:most], show, CHOSEN_BY, options.tokens)
    succession = Succession(
        first=show,
        then=list(run.corpus.valid)[:most],
        old=list(stages.base_articles.select(np.sort(old)))[:most],
        tokens=options.tokens,
        static_tokens=options.static_tokens,
        beginnings=BEGINNINGS,
        shown=SHOWN_BY,
        related=options.related,
    )
    return text, succession


def fisher_of(reader: Reader, corpus: Corpus, path: Path, batches: int) -> Parameters:
    """The Fisher of the training set, kept in a file beside the results."""
    started = time.time()

    def progress(done: int, total: int) -> None:
        if done == total:
            print(f"Fisher from {batches} batches: {time.time() - started:.0f} s", flush=True)

    names = tuple(reader.slow)
    return kept_fisher(reader.model, corpus.train, names, path, batches=batches, progress=progress)


def try_all(
    reader: Reader,
    fisher: Parameters,
    text: ChoiceText,
    options: argparse.Namespace,
    results: dict[str, Any],
    out: Path,
) -> list[ConsolidationTrial]:
    """Every share and elasticity that was not tried yet: beginnings of A, and B re-read static."""
    kept = results.setdefault("trials", [])
    known = {(trial["share"], trial["elasticity"]) for trial in kept}
    grid = [(share, pull) for share in options.shares for pull in options.elasticities]
    wanted = [
        ConsolidationConfig(share=share, elasticity=pull)
        for share, pull in grid
        if (share, pull) not in known
    ]
    for trial in try_settings(reader, fisher, text, wanted) if wanted else ():
        kept.append(dataclasses.asdict(trial))
        print({key: round(value, 5) for key, value in kept[-1].items()}, flush=True)
        write(out, results)
    return [ConsolidationTrial(**trial) for trial in kept]


def show(
    effect: Effect,
    conditions: Mapping[str, ConsolidationConfig],
    results: dict[str, Any],
    out: Path,
) -> None:
    """Reads everything in one succession under each condition; results are written as they come."""
    results |= effect.without()
    shown = results.setdefault("shown", {})
    done: dict[ConsolidationConfig, str] = {}
    for name, setting in conditions.items():
        if setting in done:
            shown[name] = shown[done[setting]]
            write(out, results)
            continue
        done[setting] = name
        if shown.get(name, {}).get("setting") == vars(setting):
            continue

        def half_way(memory: LongTermMemory, found: Found, name: str = name) -> None:
            memory.save(out / f"memory-{name.replace(' ', '-').replace(',', '')}.safetensors")
            print(name, found, flush=True)

        shown[name] = effect.of(setting, half_way)
        gains = {key: value for key, value in shown[name].items() if key.startswith("gain,")}
        print(name, gains, flush=True)
        write(out, results)


def begin(
    out: Path, options: argparse.Namespace, reader: Reader, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The results so far of the same model under the same options, or none."""
    free = ("run", "out", "threads", "shares", "elasticities")  # more trials may be added
    asked = {name: str(value) for name, value in vars(options).items() if name not in free}
    fresh = {"options": asked, "metalm": dict(settings), "model": checksum(reader.model)}
    path = out / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if {name: found.get(name) for name in fresh} == fresh else fresh


def write(out: Path, results: Mapping[str, Any]) -> None:
    """results.json, as far as it goes."""
    write_at_once(out / "results.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
