"""Where the episodes of an experiment come from: what is learnt on, chosen on, and scored once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from metalm.fewshot.tasks.distortions import DistortedEpisodes
from metalm.fewshot.tasks.episodes import Episode, EpisodePlan, EpisodeSampler, EpisodeSource
from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.images import QUARTER_TURNS, ImageEpisodes, LabelledImages
from metalm.fewshot.tasks.linear import LinearTasks
from metalm.fewshot.tasks.sine import SineTasks
from metalm.fewshot.tasks.splits import ClassSplit, official_split, random_split
from metalm.training.checked_settings import refuse_below, refuse_outside

Part = Literal["train", "validation", "test"]

# A stream of random numbers for each part: test episodes do not depend on what was trained.
_STREAMS: dict[Part, int] = {"train": 0, "validation": 1, "test": 2}
# Distortions are drawn from other numbers than the tasks.
_APART = 2**40
# What a part is for, and which options say how large its tasks are.
_PURPOSES: dict[Part, str] = {
    "train": "to learn from",
    "validation": "to choose on (validation)",
    "test": "to score on (test)",
}
_OF_TEST = "--way, --shot, --task.query"
_OPTIONS: dict[Part, str] = {
    "train": "--training.way, --training.shot, --training.query",
    "validation": _OF_TEST,
    "test": _OF_TEST,
}


CURVES: Mapping[str, str] = {"sine": "sine curves", "linear": "straight lines"}
"""Tasks of regression, which have no classes, and what they are called."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a task is, and which classes it may have."""

    source: str = "glyphs"
    """sine or linear; glyphs, which are drawn; omniglot, or the path of pictures (see the
    README)."""
    way: int = 5
    """Classes of a task (not for curves)."""
    shot: int = 1
    """Support items of a class; points of a curve."""
    query: int = 15
    """Queries of a class; points of a curve."""
    split: Literal["random", "official"] = "random"
    """Classes dealt at random, or Omniglot's background and evaluation sets."""
    test_share: float = 0.2606
    """Of the classes, for the random split (Omniglot in the literature: 423 of 1,623)."""
    validation_share: float = 0.06
    """Of the classes, for the random split; they are taken from those to learn from."""
    validation_groups: int = 5
    """Alphabets kept for validation, for the official split."""
    rotations: bool = True
    """Pictures turned by quarters are further classes to learn from."""
    turned_tests: bool = False
    """The same for validation and test, as in some of the literature."""
    within_groups: bool = False
    """A task's classes come from one group (alphabet)."""
    distorted: bool = False
    """Pictures to learn from are a little turned, sheared, scaled and shifted."""
    size: int = 28
    """Pixels of a side (not for curves)."""
    channels: Literal[1, 3] = 3
    """Of own pictures: 1 makes them grey, as the official challenge wants them; 3 keeps colours."""
    dark_ink: bool = False
    """Own pictures are dark on light, as scans are: dark is ink, which a network sees as 1."""

    def __post_init__(self) -> None:
        """Checks sizes and shares."""
        refuse_below(self, "task", "way", least=2)
        refuse_below(self, "task", "shot", "query", "size")
        refuse_below(self, "task", "validation_groups", least=0)
        refuse_outside(self, "task", "test_share", "validation_share")


class TaskShape(NamedTuple):
    """How large a task is."""

    way: int
    shot: int
    query: int


def draw_pictures(size: int = 28) -> LabelledImages:
    """The embedded default: 1,000 glyphs of 40 alphabets, 20 drawings of each.

    Args:
        size: pixels of a side.

    Raises:
        ValueError: less than one pixel.
    """
    return draw_glyphs(alphabets=40, letters=25, drawings=20, seed=0, size=size)


def split_classes(config: TaskConfig, images: LabelledImages, seed: int) -> ClassSplit:
    """Which classes serve what.

    Raises:
        ValueError: the pictures have no official split, or too few classes.
    """
    if config.split == "official":
        return official_split(
            images.parts or (),
            images.groups or (),
            num_validation_groups=config.validation_groups,
            seed=seed,
        )
    count = images.num_classes
    return random_split(
        count,
        num_test=round(config.test_share * count),
        num_validation=round(config.validation_share * count),
        seed=seed,
    )


def images_of(config: TaskConfig, part: Part, seed: int, images: LabelledImages) -> LabelledImages:
    """The pictures of a part, with rotations as further classes where they are asked for.

    Raises:
        ValueError: as `split_classes`; or the part has no classes.
    """
    chosen = images.of_classes(getattr(split_classes(config, images, seed), part))
    return chosen.with_rotations() if _turns(config, part) > 1 else chosen


def classes_of(config: TaskConfig, part: Part, seed: int, images: LabelledImages) -> int:
    """How many classes a part has, rotations included.

    Raises:
        ValueError: as `split_classes`.
    """
    return len(getattr(split_classes(config, images, seed), part)) * _turns(config, part)


def _turns(config: TaskConfig, part: Part) -> int:
    """Rotations under which a class of the part is seen."""
    turned = config.rotations if part == "train" else config.turned_tests
    return QUARTER_TURNS if turned else 1


def episode_source(
    config: TaskConfig,
    part: Part,
    seed: int,
    shape: TaskShape | None = None,
    images: LabelledImages | None = None,
    *,
    by_class: bool = False,
) -> EpisodeSource:
    """Endless episodes of one part; the same seed gives the same.

    Args:
        config: of the tasks.
        part: whose classes; curves have no parts, but a stream of their own for each.
        seed: of the split and of the episodes.
        shape: of a task; None takes the configuration's.
        images: the pictures; not for curves.
        by_class: targets are the numbers of the part's classes, not their places in the task.

    Raises:
        ValueError: too few classes or pictures; the message names the part, the class, the counts
            and the options that help.
    """
    shape = shape or TaskShape(config.way, config.shot, config.query)
    stream = seed * len(_STREAMS) + _STREAMS[part]
    if config.source == "sine":
        return SineTasks(shot=shape.shot, query=shape.query, seed=stream)
    if config.source == "linear":
        return LinearTasks(shot=shape.shot, query=shape.query, seed=stream)
    if images is None:
        raise ValueError(
            f"tasks of {config.source!r} need pictures; expected images, found none; prepare them"
        )
    _check_classes(config, part, shape.way, classes_of(config, part, seed, images), images)
    chosen = images_of(config, part, seed, images)
    try:
        sampler = EpisodeSampler(
            chosen.labels,
            shape.way,
            shape.shot,
            shape.query,
            stream,
            names=chosen.names,
            groups=chosen.groups if config.within_groups else None,
        )
    except ValueError as error:
        raise ValueError(f"{error} (classes {_PURPOSES[part]}: {_OPTIONS[part]})") from error
    source = EpisodesByClass(chosen, sampler) if by_class else ImageEpisodes(chosen, sampler)
    return (
        DistortedEpisodes(source, stream + _APART)
        if config.distorted and part == "train"
        else source
    )


def _check_classes(
    config: TaskConfig, part: Part, way: int, found: int, images: LabelledImages
) -> None:
    """Refuses a part with too few classes, and says which settings would give it more."""
    if found >= way:
        return
    total, turns = images.num_classes, _turns(config, part)
    turned = ", each under 4 rotations" if turns > 1 else ""
    raise ValueError(
        f"there are too few classes {_PURPOSES[part]}; expected at least {way} for {way}-way "
        f"episodes, found {found} ({found // turns} of {total}{turned}); "
        f"{_more_classes(config, part, math.ceil(way / turns), total)}"
        f"lower {'--training.way' if part == 'train' and way != config.way else '--way'}, or add "
        "classes"
    )


def _more_classes(config: TaskConfig, part: Part, wanted: int, total: int) -> str:
    """How a part would get so many of all classes, if there is a way: words that end in a comma."""
    if config.split == "official":
        verb = {"train": "lower", "validation": "raise", "test": ""}[part]
        groups = f"{verb} --task.validation-groups ({config.validation_groups}), "
        return groups if verb else ""
    shares = {"test": config.test_share, "validation": config.validation_share}
    if part == "train":
        return (
            "lower "
            + " or ".join(f"--task.{name}-share ({share:g})" for name, share in shares.items())
            + ", "
        )
    share = math.ceil(100 * wanted / total) / 100  # rounded up, so that it gives them surely
    others = sum(shares.values()) - shares[part]
    if share + others >= 1:
        return ""
    return f"raise --task.{part}-share from {shares[part]:g} to {share:g}, "


class EpisodesByClass(ImageEpisodes):
    """The same episodes, whose targets say which class of all it is."""

    def read(self, plan: EpisodePlan) -> Episode:
        """The pictures of tasks that were drawn already."""
        return super().read(
            plan._replace(
                support_targets=plan.classes.gather(1, plan.support_targets),
                query_targets=plan.classes.gather(1, plan.query_targets),
            )
        )
