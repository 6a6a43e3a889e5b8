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
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.corpora import prepare
from metalm.adapt.reading_state import checksum
from metalm.analysis.appearance import (
    COLOURS,
    GREYS,
    MARKERS,
    SETTINGS,
    Look,
    draw_bars,
    draw_line,
    draw_zero,
    new_figure,
    place_legend,
    save_figure,
    side_by_side,
)
from metalm.analysis.bootstrap import Interval, ratio_intervals
from metalm.language.articles import Article, Corpus, open_corpus
from metalm.language.configuration import from_json
from metalm.language.consolidation import ConsolidationConfig, LongTermMemory, read_in_succession
from metalm.language.fisher import training_fisher
from metalm.language.methods import NAMES
from metalm.language.model import LanguageModel
from metalm.language.own_texts import reader_of_run
from metalm.language.presets import ExperimentConfig
from metalm.language.reading import Reader
from metalm.language.related import nearest_earlier, similarities
from metalm.language.run_folder import RunFolder
from metalm.language.stages import Stages
from metalm.meta.parameters import Parameters
from metalm.meta.update_rule import AbstractUpdateRule
from metalm.training import checkpoint
from metalm.training.allocator import keep_freed_memory

BEGINNINGS = (200, 500, 1000)
CHOSEN_BY = 500
SHOWN_BY = 1000
CARRY = ConsolidationConfig(share=1.0, elasticity=0.0)

Losses = list[NDArray[np.float64]]
Texts = list[NDArray[np.int32]]


class Sets(NamedTuple):
    """Which articles serve what."""

    choice: list[Article]
    shown: list[Article]
    valid: list[Article]
    old: list[Article]
    """Of those that every training read."""


class Metalm(NamedTuple):
    """What reads."""

    model: LanguageModel
    rule: AbstractUpdateRule
    names: tuple[str, ...]
    segment: int


def main() -> None:
    """Chooses on A, shows on the rest, and writes results.json, a table and a plot."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    folder = RunFolder(options.run)
    config = from_json(ExperimentConfig, folder.read_configuration())
    corpus = open_corpus(
        prepare(
            config.data.source,
            tokenizer=config.data.tokenizer,
            vocabulary_size=config.data.vocabulary_size,
            root=Path(config.data.root),
        )
    )
    out = options.out or folder.folder / "consolidation"
    out.mkdir(parents=True, exist_ok=True)
    metalm, settings = load_metalm(folder)
    print("metalm:", settings, flush=True)
    sets = deal_out(config, corpus, folder, options.articles)
    fisher = fisher_of(metalm, corpus, out / "fisher.safetensors", options.batches)
    results = begin(out, options, metalm, settings)
    results["fisher"] = spread(fisher)
    print("Fisher, quantiles in units of its mean:", results["fisher"], flush=True)

    trials = try_all(metalm, fisher, sets, options, results, out)
    conditions = choose(trials)
    results["chosen"] = {name: vars(setting) for name, setting in conditions.items()}
    print("chosen:", results["chosen"], flush=True)
    show(metalm, fisher, sets, conditions, options, results, out)
    print(table(results), flush=True)
    (out / "table.md").write_text(table(results), encoding="utf-8")
    with matplotlib.rc_context(SETTINGS):
        draw(results, out / "consolidation")


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


# ---- what is read, and by what ----


def load_metalm(folder: RunFolder) -> tuple[Metalm, dict[str, Any]]:
    """The joint model and its rule, as tuned for the reset mode."""
    reader = reader_of_run(folder)
    (method,) = (m for m in reader.methods if m.name == NAMES["joint"])
    rule = reader.models.rule(method)
    assert rule is not None
    model = reader.models.model(method)
    settings = {"segment": method.segment, **method.settings}
    return Metalm(model, rule, reader.models.fast_names(method), method.segment), settings


def deal_out(config: ExperimentConfig, corpus: Corpus, folder: RunFolder, most: int) -> Sets:
    """Held-out articles in turn to choice and show; validation; thirty that all trainings read."""
    stages = Stages(config, corpus, folder)
    held_out = list(stages.held_out_articles)
    count = len(stages.base_articles)
    old = np.random.default_rng(0).permutation(count)[:30]
    return Sets(
        held_out[0::2][:most],
        held_out[1::2][:most],
        list(corpus.valid)[:most],
        list(stages.base_articles.select(np.sort(old)))[:most],
    )


def fisher_of(metalm: Metalm, corpus: Corpus, path: Path, batches: int) -> Parameters:
    """The Fisher of the training set, kept in a file beside the results."""
    identity = {"model": checksum(metalm.model), "batches": batches}
    if path.exists():
        found, meta = checkpoint.load(path)
        if meta == identity:
            return {name: found[name] for name in metalm.names}
    started = time.time()
    fisher = training_fisher(metalm.model, corpus.train, metalm.names, batches=batches)
    print(f"Fisher from {batches} batches: {time.time() - started:.0f} s", flush=True)
    checkpoint.save(path, fisher, identity)
    return fisher


def spread(fisher: Parameters) -> dict[str, Any]:
    """Quantiles of F over its mean, of all coordinates and tensor by tensor."""
    mean = sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    levels = [0.01, 0.1, 0.5, 0.9, 0.99]
    parts = {"all": np.concatenate([f.flatten().numpy() for f in fisher.values()])}
    parts |= {name: f.flatten().numpy() for name, f in fisher.items()}
    return {n: [float(f"{q / mean:.3g}") for q in np.quantile(p, levels)] for n, p in parts.items()}


def cut(articles: Sequence[Article], tokens: int) -> list[NDArray[np.int32]]:
    """The beginnings of articles."""
    return [article.tokens[:tokens] for article in articles]


def num_words(articles: Sequence[Article], tokens: int) -> NDArray[np.float64]:
    """Words in the first so many tokens of each; a word that is cut counts."""
    return np.array([a.words[:tokens][-1] + 1 for a in articles], np.float64)


def num_nats(losses: Losses, tokens: int) -> NDArray[np.float64]:
    """Summed losses of the first so many tokens of each."""
    return np.array([of_text[:tokens].sum() for of_text in losses])


def static(metalm: Metalm, memory: LongTermMemory | None, texts: Texts) -> NDArray[np.float64]:
    """Nats of each text, read without learning."""
    model = metalm.model if memory is None else memory.model(metalm.model)
    return num_nats(Reader(model, segment=64).read(texts, 12).nats, 10**9)


# ---- the choice, on A ----


def try_all(
    metalm: Metalm,
    fisher: Parameters,
    sets: Sets,
    options: argparse.Namespace,
    results: dict[str, Any],
    out: Path,
) -> list[dict[str, float]]:
    """Every share and elasticity: beginnings of A, and B re-read static."""
    trials: list[dict[str, float]] = results.setdefault("trials", [])
    known = {(trial["share"], trial["elasticity"]) for trial in trials}
    grid = [(share, pull) for share in options.shares for pull in options.elasticities]
    wanted = [setting for setting in grid if setting not in known]
    if not wanted:
        return trials
    beginnings, guard = cut(sets.choice, CHOSEN_BY), cut(sets.shown, options.tokens)
    words = num_words(sets.choice, CHOSEN_BY).sum()
    guard_words = num_words(sets.shown, options.tokens).sum()
    without = static(metalm, None, beginnings).sum() / words
    before = static(metalm, None, guard).sum() / guard_words
    steps = displacements(metalm, fisher, cut(sets.choice, options.tokens))
    for share, elasticity in wanted:
        started = time.time()
        setting = ConsolidationConfig(share=share, elasticity=elasticity)
        memory = LongTermMemory(metalm.model, fisher, setting)
        nats = 0.0
        for beginning, step in zip(beginnings, steps, strict=True):
            nats += static(metalm, memory, [beginning]).sum()
            memory.keep({name: memory.slow[name] + part for name, part in step.items()})
        trial = {
            "share": share,
            "elasticity": elasticity,
            "gain": float(without - nats / words),
            "forgotten": float(static(metalm, memory, guard).sum() / guard_words - before),
            "moved": moved(memory),
            "seconds": time.time() - started,
        }
        print({key: round(value, 5) for key, value in trial.items()}, flush=True)
        trials.append(trial)
        write(out, results)
    return trials


def displacements(metalm: Metalm, fisher: Parameters, texts: Texts) -> list[Parameters]:
    """W_T - W_0 of each text, read from home."""
    found = []
    for text in texts:
        memory = LongTermMemory(metalm.model, fisher, CARRY)
        read_in_succession(metalm.model, metalm.rule, metalm.segment, [text], memory)
        found.append({name: memory.slow[name] - home for name, home in memory.home.items()})
    return found


def choose(trials: Sequence[Mapping[str, float]]) -> dict[str, ConsolidationConfig]:
    """The best gain among those that forget nothing, with and without penalty; and plain carry."""

    def best(candidates: Sequence[Mapping[str, float]]) -> ConsolidationConfig:
        harmless = [t for t in candidates if t["forgotten"] <= 0.0]
        found = (
            max(harmless, key=lambda t: t["gain"])
            if harmless
            else min(candidates, key=lambda t: t["forgotten"])
        )
        return ConsolidationConfig(share=found["share"], elasticity=found["elasticity"])

    elastic = best([t for t in trials if t["elasticity"] > 0])
    conditions = {"elastic": elastic}
    conditions["same share, no penalty"] = ConsolidationConfig(share=elastic.share, elasticity=0.0)
    conditions["no penalty, own share"] = best([t for t in trials if t["elasticity"] == 0])
    conditions["plain carry"] = CARRY
    return conditions


# ---- the show, on B and the validation articles ----


def show(
    metalm: Metalm,
    fisher: Parameters,
    sets: Sets,
    conditions: Mapping[str, ConsolidationConfig],
    options: argparse.Namespace,
    results: dict[str, Any],
    out: Path,
) -> None:
    """Reads everything in one succession under each condition; results are written as they come."""
    before = sets.shown
    everything = [*before, *sets.valid]
    nearest, cosines = nearest_earlier(similarities([article.text for article in everything]))
    results["articles"] = [
        {"title": a.title, "nearest": int(n), "cosine": float(c)}
        for a, n, c in zip(everything, nearest, cosines, strict=True)
    ]
    texts = cut(everything, options.tokens)
    valid, old = cut(sets.valid, options.static_tokens), cut(sets.old, options.tokens)
    reader = Reader(metalm.model, metalm.rule, metalm.names, metalm.segment)
    reset = reader.read(texts, 4).nats
    homes = static(metalm, None, valid), static(metalm, None, old)
    valid_words = num_words(sets.valid, options.static_tokens)
    old_words = num_words(sets.old, options.tokens)
    results["static perplexity"] = {
        "valid": float(np.exp(homes[0].sum() / valid_words.sum())),
        "old": float(np.exp(homes[1].sum() / old_words.sum())),
    }
    groups = groups_of(sets, cosines, options.related)
    results["groups"] = {name: int(of_group.sum()) for name, of_group in groups.items()}
    results["beginnings without"] = {
        f"{name}, {tokens}": perplexity(reset, everything, of_group, tokens)
        for name, of_group in groups.items()
        for tokens in BEGINNINGS
    }
    results.setdefault("shown", {})
    done: dict[ConsolidationConfig, str] = {}
    for name, setting in conditions.items():
        if results["shown"].get(name, {}).get("setting") == vars(setting):
            done[setting] = name
            continue
        if setting in done:
            results["shown"][name] = results["shown"][done[setting]]
            continue
        done[setting] = name
        memory = LongTermMemory(metalm.model, fisher, setting)
        go_on = (metalm.model, metalm.rule, metalm.segment)
        read = read_in_succession(*go_on, texts[: len(before)], memory)
        memory.save(out / f"memory-{name.replace(' ', '-').replace(',', '')}.safetensors")
        found: dict[str, Any] = {
            "setting": vars(setting),
            "static, valid": ratio(static(metalm, memory, valid) - homes[0], valid_words),
            "static, old": ratio(static(metalm, memory, old) - homes[1], old_words),
            "moved": moved(memory),
        }
        print(name, found, flush=True)
        read += read_in_succession(*go_on, texts[len(before) :], memory)
        found["static, old, at the end"] = ratio(static(metalm, memory, old) - homes[1], old_words)
        for group, of_group in groups.items():
            for tokens in BEGINNINGS:
                saved = num_nats(reset, tokens) - num_nats(read, tokens)
                words = num_words(everything, tokens)
                found[f"gain, {group}, {tokens}"] = interval(saved[of_group], words[of_group])
        found["gains"] = (num_nats(reset, SHOWN_BY) - num_nats(read, SHOWN_BY)).tolist()
        print(name, {k: v for k, v in found.items() if k.startswith("gain,")}, flush=True)
        results["shown"][name] = found
        write(out, results)


def groups_of(
    sets: Sets, cosines: NDArray[np.float64], related: float
) -> dict[str, NDArray[np.bool_]]:
    """Which of all articles, in reading order, are shown: bool [articles] of each group."""
    place = np.repeat([1, 2], [len(sets.shown), len(sets.valid)])
    alike = cosines >= related
    return {
        "valid, related": (place == 2) & alike,
        "valid, not related": (place == 2) & ~alike,
        "valid": place == 2,
        "held-out B, related": (place == 1) & alike,
        "held-out B, not related": (place == 1) & ~alike,
        "held-out B": place == 1,
        "both, related": alike,
        "both, not related": ~alike,
    }


def perplexity(
    losses: Losses, articles: Sequence[Article], of_group: NDArray[np.bool_], tokens: int
) -> float:
    """Perplexity per word of beginnings."""
    words = num_words(articles, tokens)[of_group].sum()
    return float(np.exp(num_nats(losses, tokens)[of_group].sum() / max(words, 1)))


def interval(nats: NDArray[np.float64], words: NDArray[np.float64]) -> Interval:
    """Nats per word with the interval of a bootstrap over articles."""
    if len(nats) == 0:
        return Interval(float("nan"), None, None)
    return ratio_intervals(nats, words)[0]


def ratio(lost: NDArray[np.float64], words: NDArray[np.float64]) -> Interval:
    """Perplexity over that without consolidation."""
    return interval(lost, words).map(lambda nats: float(np.exp(nats)))


def moved(memory: LongTermMemory) -> float:
    """||W_0 - H|| / ||H|| over all fast tensors."""
    squares = [
        ((memory.slow[name] - home).double().square().sum(), home.double().square().sum())
        for name, home in memory.home.items()
    ]
    return float(np.sqrt(sum(float(way) for way, _ in squares) / sum(float(h) for _, h in squares)))


# ---- what is written ----


def begin(
    out: Path, options: argparse.Namespace, metalm: Metalm, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The results so far of the same model under the same options, or none."""
    free = ("run", "out", "threads", "shares", "elasticities")  # more trials may be added
    asked = {name: str(value) for name, value in vars(options).items() if name not in free}
    fresh = {"options": asked, "metalm": dict(settings), "model": checksum(metalm.model)}
    path = out / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if {name: found.get(name) for name in fresh} == fresh else fresh


def write(out: Path, results: Mapping[str, Any]) -> None:
    """results.json, as far as it goes."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def text_of(found: Interval, places: int = 4) -> str:
    """An interval in words."""
    estimate, low, high = found
    bounds = "" if low is None else f" ({low:.{places}f} to {high:.{places}f})"
    return f"{estimate:.{places}f}{bounds}"


def table(results: Mapping[str, Any]) -> str:
    """Every condition, in Markdown."""
    settings = results["chosen"]
    groups = [name for name, count in results["groups"].items() if count > 0]
    lines = ["| | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]
    rows: list[tuple[str, str, int]] = [
        ("static perplexity, of home's: validation", "static, valid", 4),
        ("static perplexity, of home's: training articles", "static, old", 4),
        ("the same, after the validation articles", "static, old, at the end", 4),
    ]
    rows += [
        (f"gain, nats a word: {group} ({results['groups'][group]}), first {tokens}", key, 4)
        for group in groups
        for tokens in BEGINNINGS
        for key in [f"gain, {group}, {tokens}"]
    ]
    values = [f"{s['share']:g}, {s['elasticity']:g}" for s in settings.values()]
    lines.append("| share, elasticity | " + " | ".join(values) + " |")
    for label, key, places in rows:
        cells = [text_of(Interval(*results["shown"][name][key]), places) for name in settings]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], stem: Path) -> None:
    """Gains at the beginnings of related and other articles, and forgetting: PNG and SVG."""
    figure = new_figure(12.4, 4.9)
    axes = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    axes[1].sharey(axes[0])
    colours = (*COLOURS[:3], GREYS[0])
    for number, (name, shift) in enumerate(
        zip(results["chosen"], side_by_side(len(results["chosen"])), strict=True)
    ):
        look = Look(colours[number], MARKERS[number], "-", colours[number])
        found = results["shown"][name]
        for axis, group in zip(axes, ("valid, related", "valid, not related"), strict=False):
            gains = [Interval(*found[f"gain, {group}, {tokens}"]) for tokens in BEGINNINGS]
            places = np.arange(len(gains)) + shift
            draw_line(axis, places, [gain.estimate for gain in gains], look, name)
            draw_bars(axis, places, gains, look)
        kept = [Interval(*found[key]) for key in ("static, valid", "static, old")]
        places = np.arange(len(kept)) + shift
        draw_line(axes[2], places, [100 * (k.estimate - 1) for k in kept], look, name, joined=False)
        draw_bars(axes[2], places, [k.map(lambda r: 100 * (r - 1)) for k in kept], look)
    for axis, group in zip(axes, ("valid, related", "valid, not related"), strict=False):
        axis.set_title(f"{group} ({results['groups'][group]} articles)", loc="left")
        axis.set_xticks(range(len(BEGINNINGS)), [f"first {t:,}" for t in BEGINNINGS])
        axis.set_xlabel("tokens of the article")
        draw_zero(axis)
    axes[0].set_ylabel("gain over no consolidation (nats per word)")
    axes[2].set_title("re-read static", loc="left")
    axes[2].set_ylabel("change of perplexity (%); above 0: forgotten")
    axes[2].set_xticks([0, 1], ["validation", "training"])
    draw_zero(axes[2])
    place_legend(figure, list(axes))
    save_figure(figure, stem)


if __name__ == "__main__":
    main()
