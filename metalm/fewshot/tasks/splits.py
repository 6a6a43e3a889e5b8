"""Disjoint classes to learn from, to choose on, and to score once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class ClassSplit(NamedTuple):
    """Numbers of the classes of each part, ascending; no class is in two parts.

    Attributes:
        train: meta-training classes.
        validation: meta-validation classes.
        test: meta-test classes.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def random_split(num_classes: int, *, num_test: int, num_validation: int, seed: int) -> ClassSplit:
    """Classes dealt at random, whatever group they belong to.

    Omniglot in the literature: 1,623 characters, 423 of them for the test and 1,200 to learn from;
    Finn et al. 2017 choose on 100 of the 1,200. Which classes are for the test depends on the seed
    alone, not on `num_validation`.

    Raises:
        ValueError: nothing is left to learn from.
    """
    if min(num_test, num_validation) < 0 or num_test + num_validation >= num_classes:
        raise ValueError(
            "no class is left to learn from; expected more classes than "
            f"{num_validation} for validation and {num_test} for the test, found {num_classes}; "
            "ask for fewer (--task.validation-share, --task.test-share)"
        )
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    test, rest = order[:num_test], order[num_test:]
    return _ascending(rest[num_validation:], rest[:num_validation], test)


def official_split(
    parts: Sequence[str], groups: Sequence[str], *, num_validation_groups: int, seed: int
) -> ClassSplit:
    """Omniglot as published: learn from the background set, score on the evaluation set.

    Validation takes whole groups (alphabets) of the background, so that it can be drawn within
    alphabets and asks for the same leap as the test: to alphabets never seen.

    Args:
        parts: "background" or "evaluation", for every class.
        groups: alphabet of every class.
        num_validation_groups: alphabets of the background that are kept for validation.
        seed: chooses them.

    Raises:
        ValueError: a part has another name or is empty, an alphabet lies in both, or no alphabet
            of the background is left to learn from.
    """
    if set(parts) != {"background", "evaluation"}:
        raise ValueError(
            "this data set has no official split; expected classes of the parts background and "
            f"evaluation, found {', '.join(sorted(set(parts))) or 'none'}; use a random split"
        )
    background = sorted(
        {group for group, part in zip(groups, parts, strict=True) if part[0] == "b"}
    )
    shared = {group for group, part in zip(groups, parts, strict=True) if part[0] == "e"}
    shared &= set(background)
    if shared:
        raise ValueError(
            "the official split leaks; expected alphabets of either the background or the "
            f"evaluation set, found {sorted(shared)[0]!r} in both; prepare the data again"
        )
    if not 0 <= num_validation_groups < len(background):
        raise ValueError(
            f"no alphabet is left to learn from; expected fewer than {len(background)} for "
            f"validation, found {num_validation_groups}; ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(background), generator=generator)[:num_validation_groups].tolist()
    held_out = {background[position] for position in order}
    classes = range(len(parts))
    return _ascending(
        [c for c in classes if parts[c] == "background" and groups[c] not in held_out],
        [c for c in classes if groups[c] in held_out],
        [c for c in classes if parts[c] == "evaluation"],
    )


def _ascending(train: list[int], validation: list[int], test: list[int]) -> ClassSplit:
    return ClassSplit(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(test)))
