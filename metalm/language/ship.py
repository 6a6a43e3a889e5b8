"""Write the model of a run in the form in which it is given away.

    python -m metalm.language.ship runs/wikitext-2              # the model that the package carries
    python -m metalm.language.ship runs/wikitext-2 FOLDER --dtype float32 --limit 0

The jointly trained model and its rule, the vocabulary, and the settings that tuning chose, as
`Pretrained.from_pretrained` reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metalm.adapt.reading_state import checksum
from metalm.language.pretrained import SHIPPED, Pretrained
from metalm.language.pretrained_config import Origin, PretrainedConfig, ReadingSettings
from metalm.language.run.opened_run import read_experiment
from metalm.language.run.presets import PRESETS, ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.trained import article_starts, load_model, load_rule
from metalm.language.run.trial_files import Weights, read_trials
from metalm.language.text.vocabulary import Vocabulary
from metalm.language.tuning.trials import choose_settings
from metalm.meta.parameters import choose

LIMIT = 12_000_000
"""Bytes that the package's model may take in all."""

# How and where a training ran, not what it gave.
_ELSEWHERE = {"preset", "seed", "device", "threads", "accumulation"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: the input was wrong)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that train.py wrote, tuned")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=SHIPPED, help="where the model goes"
    )
    parser.add_argument("--command", help="what made the run; default: from its configuration")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help="most bytes in all; 0 for no limit"
    )
    options = parser.parse_args(arguments)
    try:
        size = ship(
            pretrained_of(LanguageRunFolder(options.run), options.command),
            options.folder,
            getattr(torch, options.dtype),
            options.limit,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: {size:,} bytes")
    return 0


def pretrained_of(run: LanguageRunFolder, command: str | None = None) -> Pretrained:
    """The jointly trained model of a run, with the settings that tuning chose.

    Raises:
        ValueError: the run is not finished or not tuned, or a file is damaged.
    """
    config = read_experiment(run)
    config = dataclasses.replace(config, device="cpu")
    model = load_model(run, "joint", config)
    rule = load_rule(run, "joint", config, choose(model, config.rule.adapt))
    starts = article_starts(run, config, None)
    weights = {"model joint": checksum(model), "rule joint": checksum(rule)}
    reset = tuned(run, "reset", weights)
    carry = dataclasses.replace(reset, test_perplexity=None, test_static_perplexity=None)
    if read_trials(run, "carry"):
        carry = tuned(run, "carry", weights, may_flush=starts is not None)
    return Pretrained(
        model=model,
        rule=rule,
        vocabulary=Vocabulary.load(run.vocabulary_path),
        config=PretrainedConfig(
            model=config.model,
            rule=config.rule,
            reset=reset,
            carry=carry,
            origin=Origin(
                command=command or command_of(config),
                seed=config.seed,
                corpus=Path(config.data.source).name,
                version=importlib.metadata.version("metalm"),
            ),
        ),
        starts=starts if carry.flush else None,
    )


def tuned(
    run: LanguageRunFolder, mode: str, weights: Weights, *, may_flush: bool = False
) -> ReadingSettings:
    """The best settings of the joint model without a cache, and the best cache beside them.

    Args:
        run: tuned in this mode.
        mode: "reset" or "carry".
        weights: of the joint model and its rule.
        may_flush: whether settings that were tuned with a flush are among them.

    Raises:
        ValueError: the run is not tuned in this mode, was tuned with other weights, or its file of
            trials is damaged.
    """
    trials = read_trials(run, mode, weights)
    if not trials.get("joint"):
        raise ValueError(
            f"{run.folder} has no settings for reading; expected the trials of 'joint' in the mode "
            f"{mode!r}, found {', '.join(trials) or 'none'}; run python evaluate.py {run.folder} "
            "--tune"
        )
    best = choose_settings(trials["joint"], cached=False)
    flush = False
    if may_flush and trials.get("joint-flush"):
        flushing = choose_settings(trials["joint-flush"], cached=False)
        flush = flushing.perplexity < best.perplexity
        best = flushing if flush else best
    scored = test_perplexities(run, mode)
    return ReadingSettings(
        segment=best.segment,
        settings=dict(best.settings),
        cache=best.cache,
        perplexity=best.perplexity,
        cached_perplexity=best.cached_perplexity,
        flush=flush,
        test_perplexity=scored.get("metalm, flushing" if flush else "metalm"),
        test_static_perplexity=scored.get("static"),
    )


def test_perplexities(run: LanguageRunFolder, mode: str) -> dict[str, float]:
    """Perplexity per word of each method on the test articles, as the run's report has it, if any.

    Raises:
        ValueError: the report's results.json is not one that `evaluate.py` wrote.
    """
    path = run.folder / "report-test" / "results.json"
    if not path.exists():
        return {}
    try:
        modes = json.loads(path.read_text(encoding="utf-8"))["modes"]
        summary = modes[mode]["summary"] if mode in modes else []
        return {str(line["method"]): float(line["perplexity"]) for line in summary}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged; expected the results of evaluate.py, found {error!r}; run python "
            f"evaluate.py {run.folder} again"
        ) from error


def ship(pretrained: Pretrained, folder: Path, dtype: torch.dtype, limit: int) -> int:
    """Saves a model if it is small enough, in place of what was there; returns its bytes.

    Raises:
        ValueError: it is larger than the limit, or cannot be written; what was there is left.
    """
    name = "shipped" if folder.resolve() == SHIPPED else folder.name
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "model"
        pretrained.save_pretrained(saved, dtype, name=name)
        size = sum(path.stat().st_size for path in saved.iterdir())
        if 0 < limit < size:
            raise ValueError(
                f"the model is too large to be shipped; expected at most {limit:,} bytes, found "
                f"{size:,}; train a smaller one, or raise --limit"
            )
        Pretrained.from_pretrained(saved)  # what is given away can be read
    pretrained.save_pretrained(folder, dtype, name=name)
    return size


def command_of(config: ExperimentConfig) -> str:
    """The command line that gives this configuration: preset, data, seed, and what differs."""
    preset = dataclasses.asdict(PRESETS[config.preset]() if config.preset in PRESETS else config)
    source = Path(config.data.source).name
    words = ["python", "train.py", "--preset", config.preset, "--data", source]
    words += ["--seed", str(config.seed)]
    for name, value in _differing(dataclasses.asdict(config), preset):
        if name.split(".")[0] in _ELSEWHERE or name in ("data.source", "data.root"):
            continue
        if name == "model.vocabulary_size":  # follows from the data
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            head, _, last = option.removeprefix("--").rpartition(".")
            words.append(option if value else f"--{head}.no-{last}")
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [option, *map(str, values)]
    return shlex.join(words)


def _differing(
    found: Mapping[str, Any], preset: Mapping[str, Any], path: str = ""
) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            pairs += _differing(value, preset[name], f"{path}{name}.")
        elif value != preset[name]:
            pairs.append((f"{path}{name}", value))
    return pairs


if __name__ == "__main__":
    sys.exit(main())
