"""Pictures of the first test tasks: what was learnt from, and what the method answers."""

from __future__ import annotations

from pathlib import Path

import torch

from metalm.analysis.figures.curve_plot import LearntCurve, write_curve_plot
from metalm.analysis.figures.episode_plot import AnsweredEpisode, write_episode_plot
from metalm.fewshot.methods.adaptation import Adaptation
from metalm.fewshot.methods.method import FewShotMethod
from metalm.fewshot.presets import FewShotConfig
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.linear import LinearTasks
from metalm.fewshot.tasks.sine import SineTasks
from metalm.fewshot.tasks.sources import CURVES, TaskShape, episode_source

SHOWN_CURVES, SHOWN_POINTS = 3, 201
SHOWN_UPDATES = 10
SHOWN_QUERIES = 4


def draw_tasks(
    config: FewShotConfig,
    method: FewShotMethod,
    folder: Path,
    images: LabelledImages | None = None,
) -> Path:
    """Draws test tasks with the method's answers; returns the path of the picture (.png).

    Args:
        config: says what the tasks are.
        method: trained.
        folder: where curves.png (for regression) or episode.png goes, each also as .svg.
        images: the pictures; None for curves.
    """
    if images is None:
        source = episode_source(config.task, "test", config.seed)
        assert isinstance(source, SineTasks | LinearTasks)
        stem, points = folder / "curves", f"{config.task.shot} points"
        title = f"{config.method}: {CURVES[config.task.source]} learnt from {points}"
        if isinstance(method, Adaptation):
            title += ", before and after each update"
        write_curve_plot(learnt_curves(method, source), stem, title=title)
    else:
        task = config.task
        shape = TaskShape(task.way, task.shot, min(task.query, SHOWN_QUERIES))
        stem = folder / "episode"
        title = (
            f"{config.method}: a {task.way}-way {task.shot}-shot test task; dashed with a letter: "
            "wrong, and what it is"
        )
        episode = answered_episode(config, method, images, shape)
        write_episode_plot(episode, stem, title=title)
    return stem.with_suffix(".png")


@torch.no_grad()
def learnt_curves(method: FewShotMethod, source: SineTasks | LinearTasks) -> list[LearntCurve]:
    """The next curves of a source, with the answers before the first update and after each."""
    curves, episode = source.draw(SHOWN_CURVES)
    low, high = source.points
    points = torch.linspace(low, high, SHOWN_POINTS).view(1, -1, 1).expand(SHOWN_CURVES, -1, -1)
    truth = curves.at(points)
    given = (episode.support_inputs, episode.support_targets, points)
    if isinstance(method, Adaptation):
        device = next(method.parameters()).device
        updates = list(range(min(method.test_steps, SHOWN_UPDATES) + 1))
        answers = method.answers_after(updates, *(each.to(device) for each in given)).cpu()
        names: list[int | str] = [*updates]
    else:
        names, answers = ["answer"], method.predict(*given).unsqueeze(0)
    return [
        LearntCurve(
            points[task, :, 0].double().numpy(),
            truth[task, :, 0].double().numpy(),
            (
                episode.support_inputs[task, :, 0].double().numpy(),
                episode.support_targets[task, :, 0].double().numpy(),
            ),
            {
                number: own[task, :, 0].double().numpy()
                for number, own in zip(names, answers, strict=True)
            },
        )
        for task in range(SHOWN_CURVES)
    ]


def answered_episode(
    config: FewShotConfig, method: FewShotMethod, images: LabelledImages, shape: TaskShape
) -> AnsweredEpisode:
    """The first test task of this shape, with the method's answers."""
    episode = episode_source(config.task, "test", config.seed, shape, images).sample(1)
    given = episode.to(config.device)
    answers = method.predict(given.support_inputs, given.support_targets, given.query_inputs)
    return AnsweredEpisode(
        episode.support_inputs[0].double().numpy(),
        episode.support_targets[0].numpy(),
        episode.query_inputs[0].double().numpy(),
        episode.query_targets[0].numpy(),
        answers[0].argmax(-1).cpu().numpy(),
    )
