"""Siamese networks: one encoder, and a judgement of pairs (Koch et al. 2015), or of distances.

The judgement is learnt by cross-entropy on pairs, by the contrastive loss (Hadsell et al. 2006) or
by the triplet loss (Schroff et al. 2015, arXiv 1503.03832). The pairs and triplets of a task are
those of its queries with its support.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.fewshot.methods.by_class import class_best
from metalm.fewshot.methods.metric_method import MetricMethod
from metalm.fewshot.methods.pixels import Neighbours

Objective = Literal["pairs", "contrastive", "triplet"]

# Hadsell et al. leave the margin open; 1 is usual for features of any length. 0.2 is from Schroff
# et al. 2015, section 3.1, for features of length 1.
MARGINS = {"contrastive": 1.0, "triplet": 0.2}

# Of the weights behind the convolutions at the start (Koch et al. 2015, section 3.2).
DEVIATION = 0.2


def pair_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of "same class or not"; equal pairs and unequal pairs weigh the same.

    Args:
        logits: of "the same class", [tasks, queries, items].
        same: whether it is, bool, [tasks, queries, items].

    Returns:
        Nats a pair.
    """
    losses = functional.binary_cross_entropy_with_logits(
        logits, same.to(logits.dtype), reduction="none"
    )
    return _balanced(losses, same)


def contrastive_loss(squared: Tensor, same: Tensor, margin: float) -> Tensor:
    """Pulls equal pairs together and pushes others a margin apart (Hadsell et al. 2006, eq. 4).

        d^2 / 2 for equal pairs, max(0, margin - d)^2 / 2 for others

    Equal and unequal pairs weigh the same.

    Args:
        squared: d^2, squared distances, [tasks, queries, items].
        same: as in `pair_loss`.
        margin: in units of d.
    """
    # The root has no derivative at zero.
    distances = squared.clamp_min(1e-12).sqrt()
    losses = torch.where(same, squared, (margin - distances).clamp_min(0).square()) / 2
    return _balanced(losses, same)


def triplet_loss(squared: Tensor, same: Tensor, margin: float) -> Tensor:
    """Wants every other class a margin further than the own one (Schroff et al. 2015, eq. 3).

        max(0, d(query, positive)^2 - d(query, negative)^2 + margin)

    Over every triplet of a query, a support item of its class and one of another. A task's mean is
    over its triplets that are not satisfied, so that its size does not fade with their number
    (Hermans et al. 2017, arXiv 1703.07737, section 2); 0 when all are.

    Args:
        squared: squared distances, [tasks, queries, items].
        same: as in `pair_loss`.
        margin: in units of squared distance.
    """
    violations = (squared.unsqueeze(3) - squared.unsqueeze(2) + margin).clamp_min(0)
    triplets = same.unsqueeze(3) & ~same.unsqueeze(2)
    violations = violations * triplets
    active = (violations > 0).sum((1, 2, 3)).clamp_min(1)
    return (violations.sum((1, 2, 3)) / active).mean()


def _balanced(losses: Tensor, same: Tensor) -> Tensor:
    return (losses[same].mean() + losses[~same].mean()) / 2


class Siamese(MetricMethod):
    """A query belongs to the class of the support item that it most resembles.

    For "pairs", p(same) = sigmoid(sum over j of a_j |s_j - s'_j| + b) with s = sigmoid(M f(x)), as
    in Koch et al.; their convolutions for 105 x 105 pixels are replaced by the encoder given. For
    "contrastive" and "triplet", the squared distance of features decides; for "triplet" they are
    brought to length 1.

    Args:
        encoder: pictures -> [pictures, ...].
        statistics: of the encoder's batch normalisation.
        objective: what is learnt.
        num_features: numbers that the encoder gives a picture; "pairs" needs it.
        units: length of s; 4,096 in Koch et al., for larger pictures.
        margin: of the loss; see `MARGINS` for the default.

    Raises:
        ValueError: the number of features is missing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        statistics: str,
        *,
        objective: Objective,
        num_features: int | None = None,
        units: int = 512,
        margin: float | None = None,
    ) -> None:
        super().__init__(encoder, statistics)
        self.objective = objective
        self.margin = MARGINS.get(objective, 0.0) if margin is None else margin
        if objective == "pairs":
            if num_features is None:
                raise ValueError(
                    "the judgement of pairs has no size; expected the number of features of the "
                    "encoder, found none; give num_features"
                )
            self.units = nn.Linear(num_features, units)
            self.judge = nn.Linear(units, 1)
            for matrix in (self.units, self.judge):
                nn.init.normal_(matrix.weight, 0, DEVIATION)

    def memory(self, features: Tensor, targets: Tensor) -> Neighbours:
        """The embedded support items."""
        return Neighbours(self._prepared(features), targets)

    def compare(self, memory: Neighbours, features: Tensor) -> Tensor:
        """Likeness to the most similar item of each class, [tasks, queries, way]."""
        return class_best(self._likeness(memory, features), memory.targets)

    def meta_loss(
        self, support: Tensor, support_targets: Tensor, query: Tensor, query_targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of all pairs or triplets of queries with the support."""
        likeness = self._likeness(self.memory(support, support_targets), query)
        same = query_targets.unsqueeze(2) == support_targets.unsqueeze(1)
        if self.objective == "pairs":
            loss = pair_loss(likeness, same)
        elif self.objective == "contrastive":
            loss = contrastive_loss(-likeness, same, self.margin)
        else:
            loss = triplet_loss(-likeness, same, self.margin)
        return loss, class_best(likeness, support_targets)

    def _prepared(self, features: Tensor) -> Tensor:
        features = features.flatten(2)
        if self.objective == "pairs":
            return self.units(features).sigmoid()
        return functional.normalize(features, dim=-1) if self.objective == "triplet" else features

    def _likeness(self, memory: Neighbours, features: Tensor) -> Tensor:
        """Logits of "same class", or minus the squared distances, [tasks, queries, items]."""
        differences = self._prepared(features).unsqueeze(2) - memory.features.unsqueeze(1)
        if self.objective == "pairs":
            return self.judge(differences.abs()).squeeze(-1)
        return -differences.square().sum(-1)
