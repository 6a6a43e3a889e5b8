"""One few-shot experiment: train a method, score it on test tasks, keep what was found.

A run's folder: configuration.json; stages/method (checkpoints, metrics.jsonl); method.safetensors,
the trained method; results.json, the mean score and that of every test task. `shown_tasks.py` adds
a picture, and `official-runs.json` is there once the official challenge was scored.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from metalm.fewshot.method_names import BY_CLASS, made
from metalm.fewshot.methods.adaptation import Adaptation
from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.presets import FewShotConfig
from metalm.fewshot.scoring import Estimate, estimate, scores_after, task_scores
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.sources import Part, episode_source
from metalm.fewshot.training import FewShotTraining
from metalm.training.disk import write_at_once
from metalm.training.loop import run
from metalm.training.record import Progress, Record
from metalm.training.run_folder import RunFolder
from metalm.training.state import pack, unpack

STAGE = "method"
VALIDATION_TASKS = 100
# Settings that a training does not depend on, and those that it looks at in validation alone.
_OF_SCORING = {"root", "scoring.tasks", "scoring.updates", "adaptation.checkpoints"}
_OF_USE = {"adaptation.test_steps", "adaptation.test_batch"}
_LATER = {
    "task": ("channels", "dark_ink", "distorted"),
    "network": ("late_width", "depth", "halvings", "reach"),
    "adaptation": ("bfloat16", "step_weights"),
}


class Result(NamedTuple):
    """What an experiment found.

    Attributes:
        score: accuracy, or mean squared error for regression, over test tasks.
        facts: what the score depends on, for tables: split, rotations, queries, episodes, whose
            statistics batch normalisation used, updates before the queries were answered, seed.
        after: the same score after other numbers of updates, for methods that make them.
    """

    score: Estimate
    facts: dict[str, Any]
    after: Mapping[int, Estimate] = {}


def train(
    config: FewShotConfig, folder: RunFolder, images: LabelledImages | None = None
) -> FewShotMethod:
    """Trains the method to its last step, from its newest checkpoint if there is one.

    Raises:
        ValueError: the folder belongs to another run, the method does not exist or cannot have such
            tasks, or there are too few classes or pictures.
    """
    torch.manual_seed(config.seed)
    method = made(config, images).to(config.device)
    by_class = config.method in BY_CLASS
    source = episode_source(
        config.task, "train", config.seed, config.trained_on, images, by_class=by_class
    )
    parameters = list(method.parameters())
    # They refuse before it is too late: before a folder is bound to these settings.
    parts: list[Part] = ["validation", "test"] if parameters else ["test"]
    for part in parts:
        episode_source(config.task, part, config.seed, None, images)
    trained = folder.has(STAGE) or not parameters
    folder.write_configuration(config, _OF_SCORING | (_OF_USE if trained else set()))
    if folder.has(STAGE) or not parameters:
        return load(config, folder, images) if parameters else method
    training = FewShotTraining(
        method,
        source,
        optimizer(config, parameters),
        tasks=config.training.tasks,
        schedule=schedule(config),
        clip=config.training.clip,
        device=config.device,
    )
    with Record(folder.stage(STAGE)) as record:
        run(
            training,
            num_steps=config.training.steps,
            folder=folder.stage(STAGE),
            record=record,
            evaluate=lambda _: _validation(config, method, images),
            evaluate_every=max(1, config.training.steps // 10),
            save_every_seconds=60.0,
            log_every=20,
            configuration=_relevant(config),
            title=config.method,
        )
    folder.save(STAGE, *pack(method.state_dict()))
    return method


def load(
    config: FewShotConfig, folder: RunFolder, images: LabelledImages | None = None
) -> FewShotMethod:
    """The trained method of a run.

    Raises:
        ValueError: it has not been trained, or the file is damaged.
    """
    method = made(config, images)
    if next(method.parameters(), None) is not None:
        method.load_state_dict(unpack(*folder.load(STAGE)))
    return method.to(config.device)


def score(
    config: FewShotConfig,
    method: FewShotMethod,
    folder: RunFolder,
    images: LabelledImages | None = None,
) -> Result:
    """Scores the trained method on test tasks and writes results.json."""
    source = episode_source(config.task, "test", config.seed, None, images)
    with Progress(f"{config.method}, test tasks", config.scoring.tasks) as progress:

        def tell(tasks: int) -> None:
            for _ in range(tasks):
                progress.update()

        given: dict[str, Any] = {"device": config.device, "progress": tell}
        if isinstance(method, Adaptation):
            updates = [method.test_steps, *config.scoring.updates]
            found = scores_after(method, updates, source, config.scoring.tasks, **given)
            scores = found[method.test_steps]
        else:
            scores, found = task_scores(method, source, config.scoring.tasks, **given), {}
    after = {number: estimate(found[number]) for number in sorted(config.scoring.updates) if found}
    result = Result(estimate(scores), facts(config, method), after)
    content = {
        "score": dataclasses.asdict(result.score),
        "facts": result.facts,
        "after": {number: dataclasses.asdict(own) for number, own in after.items()},
        "tasks": scores,
    }
    write_at_once(folder.folder / "results.json", json.dumps(content, indent=1) + "\n")
    return result


def facts(config: FewShotConfig, method: FewShotMethod) -> dict[str, Any]:
    """What a score means, beside the number."""
    task = config.task
    return {
        "method": config.method,
        "task": task.source,
        "way": task.way,
        "shot": task.shot,
        "query": task.query,
        "split": task.split,
        "rotations": task.rotations,
        "turned_tests": task.turned_tests,
        "within_groups": task.within_groups,
        "distorted": task.distorted,
        "batch_normalisation": method.statistics,
        "updates": method.test_steps if isinstance(method, Adaptation) else None,
        "seed": config.seed,
        "steps": config.training.steps if any(True for _ in method.parameters()) else 0,
    }


def optimizer(config: FewShotConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain steps for Reptile, whose meta-gradient is a distance; Adam for the others."""
    kind = torch.optim.SGD if config.method == "reptile" else torch.optim.Adam
    return kind(parameters, lr=config.training.rate)


def schedule(config: FewShotConfig) -> Callable[[int], float]:
    """The learning rate at a step: halved now and then, or along a half cosine to zero."""
    training = config.training

    def rate(step: int) -> float:
        if training.halve_every > 0:
            return training.rate * 0.5 ** (step // training.halve_every)
        return training.rate * 0.5 * (1 + math.cos(math.pi * step / training.steps))

    return rate


def _validation(
    config: FewShotConfig, method: FewShotMethod, images: LabelledImages | None
) -> dict[str, float]:
    source = episode_source(config.task, "validation", config.seed, None, images)
    found = estimate(task_scores(method, source, VALIDATION_TASKS, device=config.device))
    return {"score": found.mean, "margin": found.margin}


def _relevant(config: FewShotConfig) -> dict[str, Any]:
    """What the numbers of the training depend on.

    Settings that came later are named where they differ from what was there before them: a
    checkpoint from then is continued.
    """
    settings = dataclasses.asdict(config)
    before = dataclasses.asdict(FewShotConfig())
    del settings["adaptation"]["checkpoints"]  # of memory alone
    for part, names in _LATER.items():
        for name in names:
            if settings[part][name] == before[part][name]:
                del settings[part][name]
    return {
        name: settings[name]
        for name in ("method", "seed", "task", "network", "adaptation", "training")
    }
