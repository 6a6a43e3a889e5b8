"""Support items gathered by class; the order of the items plays no part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def num_ways(targets: Tensor) -> int:
    """Classes of an episode, whose targets [tasks, items] count from 0."""
    return int(targets.max()) + 1


def class_sums(features: Tensor, targets: Tensor) -> Tensor:
    """Sum over the items of each class.

    Args:
        features: [tasks, items, ...].
        targets: [tasks, items].

    Returns:
        [tasks, way, ...].
    """
    members = functional.one_hot(targets, num_ways(targets)).to(features.dtype)
    return torch.einsum("tiw,ti...->tw...", members, features)


def class_means(features: Tensor, targets: Tensor) -> Tensor:
    """Mean over the items of each class; as `class_sums`."""
    sums = class_sums(features, targets)
    counts = functional.one_hot(targets, num_ways(targets)).sum(1)
    return sums / counts.reshape(*counts.shape, *[1] * (sums.dim() - 2))


def class_best(scores: Tensor, targets: Tensor) -> Tensor:
    """Best score among the items of each class.

    Args:
        scores: of every query for every support item, [tasks, queries, items].
        targets: of the support items, [tasks, items].

    Returns:
        [tasks, queries, way].
    """
    return _apart(scores, targets).amax(-1)


def class_logsumexp(scores: Tensor, targets: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of each class; as `class_best`."""
    return _apart(scores, targets).logsumexp(-1)


def _apart(scores: Tensor, targets: Tensor) -> Tensor:
    """Scores [tasks, queries, way, items], minus infinity for items of other classes."""
    members = functional.one_hot(targets, num_ways(targets)).bool().mT
    return scores.unsqueeze(2).masked_fill(~members.unsqueeze(1), -torch.inf)
