import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.images import LabelledImages
from metalm.fewshot.tasks.sources import TaskConfig, TaskShape, episode_source, split_classes

CONFIG = TaskConfig(way=3, shot=1, query=2, test_share=0.25, validation_share=0.25)


@pytest.fixture
def images():
    """Twenty classes of four pictures; every pixel holds the number of the class."""
    numbers = np.repeat(np.arange(20, dtype=np.uint8), 4)
    pictures = np.broadcast_to(numbers[:, None, None, None], (80, 1, 2, 2)).copy()
    groups = [f"alphabet {number // 5}" for number in range(20)]
    parts = ["background" if number < 15 else "evaluation" for number in range(20)]
    names = [str(number) for number in range(20)]
    return LabelledImages(pictures, numbers.astype(np.int64), names, groups=groups, parts=parts)


def classes_seen(source, tasks=200):
    episode = source.sample(tasks)
    pixels = torch.cat([episode.support_inputs, episode.query_inputs], 1)[..., 0, 0, 0]
    return set((pixels * 255).round().long().flatten().tolist())


@pytest.mark.parametrize("split", ["random", "official"])
def test_no_class_is_in_two_parts(images, split):
    config = replace(CONFIG, split=split, validation_groups=1)
    parts = [
        classes_seen(episode_source(config, p, 3, images=images))
        for p in ("train", "validation", "test")
    ]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 20
    assert [set(part) for part in split_classes(config, images, 3)] == parts
    assert parts[2] == set(range(15, 20)) if split == "official" else len(parts[2]) == 5


def test_the_same_seed_gives_the_same_episodes_and_parts_have_their_own(images):
    def first(part, seed):
        return episode_source(CONFIG, part, seed, images=images).sample(4).support_inputs

    assert torch.equal(first("test", 1), first("test", 1))
    assert not torch.equal(first("test", 1), first("test", 2))
    sine = replace(CONFIG, source="sine")
    one, other = (episode_source(sine, part, 1).sample(2) for part in ("train", "test"))
    assert not torch.equal(one.support_inputs, other.support_inputs)
    assert one.support_inputs.shape == (2, 1, 1)
    assert one.query_inputs.shape == (2, 2, 1)


def test_rotated_classes_are_learnt_from_and_not_tested_on():
    glyphs = draw_glyphs(alphabets=2, letters=6, drawings=3, seed=1, size=16)
    config = replace(CONFIG, rotations=True)
    assert episode_source(config, "train", 0, images=glyphs).images.num_classes == 4 * 6
    assert episode_source(config, "test", 0, images=glyphs).images.num_classes == 3
    turned = replace(config, turned_tests=True, rotations=False)
    assert episode_source(turned, "train", 0, images=glyphs).images.num_classes == 6
    assert episode_source(turned, "test", 0, images=glyphs).images.num_classes == 12


def test_training_may_have_tasks_of_another_shape(images):
    found = episode_source(CONFIG, "train", 0, TaskShape(6, 2, 1), images).sample(3)
    assert found.support_inputs.shape[:2] == (3, 12)
    assert found.query_targets.shape == (3, 6)


def test_tasks_within_a_group(images):
    config = replace(CONFIG, within_groups=True, split="official", validation_groups=1)
    episode = episode_source(config, "train", 0, images=images).sample(50)
    groups = (episode.support_inputs[..., 0, 0, 0] * 255).round().long() // 5
    assert (groups == groups[:, :1]).all()
    assert len(groups.unique()) > 1


def test_too_few_pictures_and_no_pictures_are_refused(images):
    with pytest.raises(ValueError, match=r"class '\d+ rot000' has too few pictures; .* found 4"):
        episode_source(replace(CONFIG, query=4), "train", 0, images=images)
    with pytest.raises(ValueError, match="tasks of 'glyphs' need pictures"):
        episode_source(CONFIG, "train", 0)
    grouped = replace(CONFIG, within_groups=True)
    options = r"\(classes to score on \(test\): --way, --shot, --task\.query\)"
    with pytest.raises(ValueError, match=rf"no group has enough classes; .* {options}"):
        episode_source(replace(grouped, way=4), "test", 0, images=images)


@pytest.mark.parametrize(
    ("part", "changes", "way", "message"),
    [
        (
            "validation",
            {"validation_share": 0.06},
            3,
            r"to choose on \(validation\); expected at least 3 for 3-way episodes, found 1 \(1 of "
            r"20\); raise --task\.validation-share from 0\.06 to 0\.15, lower --way, or",
        ),
        (
            "validation",
            {"validation_share": 0.0},
            3,
            r"found 0 \(0 of 20\); raise --task\.validation-share from 0 to 0\.15, lower --way",
        ),
        (
            "test",
            {"turned_tests": True},
            21,
            r"to score on \(test\); expected at least 21 .*, found 20 \(5 of 20, each under 4 "
            r"rotations\); raise --task\.test-share from 0\.25 to 0\.3, lower --way, or",
        ),
        ("test", {}, 16, r"found 5 \(5 of 20\); lower --way, or add classes"),  # no share does it
        (
            "train",
            {"rotations": False},
            11,
            r"to learn from; .* found 10 \(10 of 20\); lower --task\.test-share \(0\.25\) or "
            r"--task\.validation-share \(0\.25\), lower --training\.way, or",
        ),
        (
            "validation",
            {"split": "official", "validation_groups": 1},
            6,
            r"found 5 .*; raise --task\.validation-groups \(1\), lower --way, or",
        ),
        (
            "test",
            {"split": "official", "validation_groups": 1},
            6,
            r"found 5 .*\); lower --way, or",
        ),
    ],
)
def test_too_few_classes_of_a_part_are_told_with_what_helps(images, part, changes, way, message):
    config, shape = replace(CONFIG, **changes), TaskShape(way, 1, 2)
    with pytest.raises(ValueError, match=message) as refused:
        episode_source(config, part, 0, shape, images)
    # Whoever does what it says is not refused again.
    advice = re.search(r"raise --task\.(\w+)-share from \S+ to ([\d.]+),", str(refused.value))
    if advice is not None:
        enough = replace(config, **{f"{advice[1]}_share": float(advice[2])})
        assert episode_source(enough, part, 0, shape, images).sample(1) is not None
