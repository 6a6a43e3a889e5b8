import math

import pytest
import torch

from metalm.fewshot.tasks.linear import LinearTasks, bayes_answers, bayes_error, with_one
from metalm.fewshot.tasks.sine import SineTasks


def sines(seed=0, **changes):
    return SineTasks(**{"shot": 5, "query": 7, "seed": seed} | changes)


def lines(seed=0, **changes):
    return LinearTasks(**{"inputs": 2, "shot": 5, "query": 7, "seed": seed} | changes)


@pytest.mark.parametrize("tasks", [sines, lines])
def test_same_seed_same_tasks_however_many_at_once_and_after_a_pause(tasks):
    whole, parts = tasks().sample(40), tasks()
    first = parts.sample(13)
    state = parts.state_dict()
    for resumed in (parts, tasks(seed=5)):
        resumed.load_state_dict(state)
        second = resumed.sample(27)
        for all_of, one, other in zip(whole, first, second, strict=True):
            assert torch.equal(all_of, torch.cat([one, other]))
    assert not torch.equal(whole.query_targets, tasks(seed=1).sample(40).query_targets)


def test_sine_values_by_hand():
    curves, episode = sines().draw(3)
    for task in range(3):
        amplitude, phase = float(curves.amplitude[task]), float(curves.phase[task])
        for points, values in (episode[:2], episode[2:]):
            for x, y in zip(points[task, :, 0].tolist(), values[task, :, 0].tolist(), strict=True):
                assert y == pytest.approx(amplitude * math.sin(x - phase), abs=1e-5)


def test_sine_ranges_are_those_of_the_paper():
    # The extremes of 5,000 uniform numbers lie within 0.2 % of the ends but for odds of e^-10.
    curves, episode = sines().draw(5000)
    for values, low, high in (
        (curves.amplitude, 0.1, 5.0),
        (curves.phase, 0.0, math.pi),
        (episode.support_inputs, -5.0, 5.0),
        (episode.query_inputs, -5.0, 5.0),
    ):
        slack = 0.002 * (high - low)
        assert low <= float(values.min()) < low + slack
        assert high - slack < float(values.max()) <= high
    assert torch.equal(curves.frequency, torch.ones(5000))


def test_curves_of_another_frequency():
    curves, episode = sines(frequency=(2.0, 2.0), phase=(0.0, 0.0)).draw(2)
    expected = curves.amplitude.view(2, 1, 1) * (2 * episode.query_inputs).sin()
    torch.testing.assert_close(episode.query_targets, expected)


def test_values_of_lines_are_theirs_and_noise():
    drawn, episode = lines(noise=0.01).draw(50)
    again = lines(noise=0.01).sample(50)
    for one, other in zip(episode, again, strict=True):
        assert torch.equal(one, other)
    left = episode.query_targets - drawn.at(episode.query_inputs)
    assert float(left.std()) == pytest.approx(0.01, rel=0.2)
    slope = drawn.weights[:, :2].mT @ torch.tensor([1.0, 0.0]).view(2, 1)
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]).expand(50, 2, 2)
    values = drawn.at(points)
    torch.testing.assert_close(values[:, 1:] - values[:, :1], slope)


def test_support_alone_decides_what_the_least_squares_say():
    # Without noise to speak of, 5 points of a plane decide it.
    episode = lines(noise=1e-6).sample(4)
    doubled = [each.double() for each in episode]
    answers = bayes_answers(doubled[0], doubled[1], doubled[2], ridge=1e-12)
    torch.testing.assert_close(answers, doubled[3], rtol=0, atol=1e-4)


def test_bayes_answers_are_the_posterior_mean_of_a_gaussian_process():
    # The same posterior in its dual form: kernel spread^2 (x x' + 1), no weights at all.
    tasks = lines(spread=1.7, noise=0.4)
    x, y, query, _ = (each.double() for each in tasks.sample(3))
    kernel = 1.7**2 * with_one(x) @ with_one(x).mT + 0.4**2 * torch.eye(5).double()
    across = 1.7**2 * with_one(query) @ with_one(x).mT
    expected = across @ torch.linalg.inv(kernel) @ y
    found = bayes_answers(x, y, query, ridge=(0.4 / 1.7) ** 2)
    torch.testing.assert_close(found, expected)
    own = 1.7**2 * with_one(query).square().sum(-1, keepdim=True)
    spare = (across @ torch.linalg.inv(kernel) * across).sum(-1, keepdim=True)
    expected_error = own - spare + 0.4**2
    torch.testing.assert_close(bayes_error(x, query, spread=1.7, noise=0.4), expected_error)


def test_the_expected_error_is_met_and_not_undercut():
    tasks = lines(spread=1.5, noise=0.5, query=20)
    x, y, query, truth = (each.double() for each in tasks.sample(3000))
    ridge = (0.5 / 1.5) ** 2
    losses = {
        factor: (bayes_answers(x, y, query, ridge=ridge * factor) - truth).square()
        for factor in (0.2, 1.0, 5.0)
    }
    expected = bayes_error(x, query, spread=1.5, noise=0.5)
    by_task = (losses[1.0] - expected).mean((1, 2))
    assert abs(float(by_task.mean())) < 4 * float(by_task.std()) / 3000**0.5
    for factor in (0.2, 5.0):
        worse = (losses[factor] - losses[1.0]).mean((1, 2))
        assert float(worse.mean()) > 4 * float(worse.std()) / 3000**0.5


def test_tasks_without_points_are_refused():
    with pytest.raises(ValueError, match="at least 1 support and 1 query point, found 0 and 7"):
        sines(shot=0)
    with pytest.raises(ValueError, match=r"positive deviations, .* noise 0"):
        lines(noise=0.0)
