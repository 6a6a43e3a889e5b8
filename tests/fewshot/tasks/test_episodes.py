import numpy as np
import pytest
import torch

from metalm.fewshot.tasks.episodes import EpisodeSampler

# Class sizes 7, 9, 8, 7, 11, in a shuffled order.
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [7, 9, 8, 7, 11]))


def sampler(seed=3, **changes):
    sizes = {"way": 3, "shot": 2, "query": 4} | changes
    return EpisodeSampler(LABELS, **sizes, seed=seed)


def tasks(plan):
    return [type(plan)(*each) for each in zip(*plan, strict=True)]


def test_every_target_stands_for_one_class_of_the_labels():
    plan = sampler().sample(50)
    labels = torch.from_numpy(LABELS)
    for task in tasks(plan):
        assert torch.equal(labels[task.support_items], task.classes[task.support_targets])
        assert torch.equal(labels[task.query_items], task.classes[task.query_targets])
        assert len(set(task.classes.tolist())) == 3
        assert torch.bincount(task.support_targets).tolist() == [2, 2, 2]
        assert torch.bincount(task.query_targets).tolist() == [4, 4, 4]


def test_support_and_query_never_overlap():
    for task in tasks(sampler(shot=3).sample(100)):
        items = torch.cat([task.support_items, task.query_items]).tolist()
        assert len(set(items)) == len(items) == 3 * (3 + 4)


def test_same_seed_same_episodes_however_many_at_once():
    whole = sampler().sample(7)
    parts = sampler()
    first, second = parts.sample(2), parts.sample(5)
    for all_of, one, other in zip(whole, first, second, strict=True):
        assert torch.equal(all_of, torch.cat([one, other]))
    assert not torch.equal(whole.support_items, sampler(seed=4).sample(7).support_items)


def test_the_global_generator_plays_no_part():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plan = sampler().sample(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(plan.query_items, sampler().sample(3).query_items)


def test_a_resumed_sampler_goes_on():
    straight = sampler()
    straight.sample(5)
    state = straight.state_dict()
    expected = straight.sample(4)
    resumed = sampler(seed=99)
    resumed.load_state_dict(state)
    for one, other in zip(expected, resumed.sample(4), strict=True):
        assert torch.equal(one, other)


def test_classes_and_items_are_drawn_evenly():
    # 4,000 draws of 3 out of 5 classes: each has 2,400 +- 31; of 1 out of 7 items, likewise.
    plan = EpisodeSampler(LABELS, 3, 1, 1, 0).sample(4000)
    counts = torch.bincount(plan.classes.flatten()).double()
    assert (counts - 2400).abs().max() < 5 * (4000 * 0.6 * 0.4) ** 0.5
    first = plan.support_items[torch.from_numpy(LABELS)[plan.support_items] == 0]
    counts = torch.unique(first, return_counts=True)[1].double()
    assert len(counts) == 7
    expected = counts.sum() / 7
    assert (counts - expected).abs().max() < 5 * expected.sqrt()


def test_the_order_of_a_task_gives_no_hint():
    plan = EpisodeSampler(LABELS, 3, 1, 1, 0).sample(3000)
    for targets in (plan.support_targets, plan.query_targets):
        counts = torch.bincount(targets[:, 0]).double()
        assert (counts - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


def test_episodes_within_groups():
    groups = ["a", "b", "a", "b", "a"]
    plan = EpisodeSampler(LABELS, 2, 2, 2, 0, groups=groups).sample(400)
    found = [{groups[number] for number in task.tolist()} for task in plan.classes]
    assert all(len(each) == 1 for each in found)
    # Groups are drawn evenly, whatever their size; and all their classes come.
    assert abs(sum(each == {"a"} for each in found) - 200) < 50
    assert set(plan.classes.flatten().tolist()) == {0, 1, 2, 3, 4}


def test_groups_with_too_few_classes_are_left_out():
    plan = EpisodeSampler(LABELS, 3, 1, 1, 0, groups=["a", "b", "a", "b", "a"]).sample(20)
    assert all(sorted(task.tolist()) == [0, 2, 4] for task in plan.classes)


def test_aligned_episodes_take_the_same_positions_in_every_class():
    # Item j of a class is by author j: items are class * 6 + author.
    labels = np.repeat(np.arange(4), 6)
    for task in tasks(EpisodeSampler(labels, 3, 2, 1, 0, aligned=True).sample(30)):
        support = {int(item) % 6 for item in task.support_items}
        query = {int(item) % 6 for item in task.query_items}
        assert len(support) == 2
        assert len(query) == 1
        assert not support & query


class LabelsAlone:
    """Something that has labels, and that nothing else may be asked of."""

    def __array__(self, dtype=None, copy=None):
        return LABELS


def test_labels_alone_are_read():
    plan = EpisodeSampler(LabelsAlone(), 3, 2, 4, 3).sample(2)
    assert torch.equal(plan.support_items, sampler().sample(2).support_items)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": 6}, r"expected at least 6 for 6-way episodes, found 5"),
        ({"shot": 4}, r"class 'c0' has too few pictures; .* 8 \(4 support \+ 4 query\), found 7"),
        ({"way": 1}, r"expected at least 2 classes, .* found way 1, shot 2, query 4"),
        ({"query": 0}, r"query 0"),
        ({"groups": ["a"] * 4}, r"groups do not fit the classes; expected 5, found 4"),
        ({"groups": ["a", "b", "a", "b", "c"]}, r"within a group, found at most 2 \('a'\)"),
        ({"aligned": True}, r"expected equal ones for aligned episodes, found 7 to 11"),
    ],
)
def test_impossible_tasks_are_refused(changes, message):
    arguments = {"way": 3, "shot": 2, "query": 4, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(LABELS, **arguments, names=[f"c{n}" for n in range(5)])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0], "these are no labels"),
        ([], "these are no labels"),
        ([[0, 1]], "these are no labels"),
        ([0, -1], "a label is negative"),
        ([0, 0, 0, 2, 2, 2], "class number 1 has too few pictures; .* found 0"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(labels, 2, 1, 1, 0)


def test_no_episode_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 task, found 0"):
        sampler().sample(0)
