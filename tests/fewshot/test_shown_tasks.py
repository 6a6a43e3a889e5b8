"""The pictures of test tasks show what the method answers on the tasks that are scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metalm.fewshot.method_names import made
from metalm.fewshot.presets import preset
from metalm.fewshot.shown_tasks import answered_episode, draw_tasks, learnt_curves
from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.sine import SineTasks
from metalm.fewshot.tasks.sources import TaskShape, episode_source


@pytest.fixture(scope="module")
def images():
    return draw_glyphs(alphabets=5, letters=8, drawings=6, seed=2)


def test_curves_are_those_of_the_method_after_each_update():
    config = preset("maml", "sine", shot=4)
    method = made(replace(config, adaptation=replace(config.adaptation, test_steps=3)))
    shown = learnt_curves(method, SineTasks(shot=4, query=2, seed=6))
    truth, episode = SineTasks(shot=4, query=2, seed=6).draw(len(shown))
    for task, curve in enumerate(shown):
        assert list(curve.answers) == [0, 1, 2, 3]
        np.testing.assert_allclose(curve.support[1], episode.support_targets[task, :, 0])
        expected = float(truth.amplitude[task]) * np.sin(curve.points - float(truth.phase[task]))
        np.testing.assert_allclose(curve.truth, expected, atol=1e-5)
        points = torch.from_numpy(curve.points).float().view(1, -1, 1)
        for steps, said in curve.answers.items():
            method.test_steps = steps
            given = (each[task : task + 1] for each in episode[:2])
            alone = method.predict(*given, points)
            np.testing.assert_allclose(said, alone[0, :, 0], rtol=1e-4, atol=1e-5)


def test_the_episode_is_the_first_test_task(images):
    config = preset("pixels", way=3)
    config = replace(config, task=replace(config.task, query=5, validation_share=0.2))
    method, shape = made(config, images), TaskShape(3, 1, 4)
    shown = answered_episode(config, method, images, shape)
    episode = episode_source(config.task, "test", config.seed, shape, images).sample(1)
    np.testing.assert_allclose(shown.query, episode.query_inputs[0])
    np.testing.assert_array_equal(shown.query_targets, episode.query_targets[0])
    apart = episode.query_inputs[0].flatten(1)[:, None] - episode.support_inputs[0].flatten(1)
    nearest = episode.support_targets[0][apart.square().sum(-1).argmin(1)]
    np.testing.assert_array_equal(shown.answers, nearest)


def test_pictures_are_written(images, tmp_path):
    config = preset("pixels", way=3)
    config = replace(config, task=replace(config.task, query=2, validation_share=0.2))
    assert draw_tasks(config, made(config, images), tmp_path, images) == tmp_path / "episode.png"
    config = preset("maml", "sine", shot=4)
    assert draw_tasks(config, made(config), tmp_path) == tmp_path / "curves.png"
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["curves.png", "curves.svg", "episode.png", "episode.svg"]
