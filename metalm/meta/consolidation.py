"""Consolidation: what was learnt fast moves the slow weights, held back by an elastic penalty.

After a text that began at W_0 and ended at W_T, W_0 becomes the least of three quadratics, one for
each thing that should be remembered: the text just read, the texts before it, and the training set:

    a/2 |W - W_T|^2  +  (1 - a)/2 |W - W_0|^2  +  l/2 (W - H)^T F (W - H)

    W_0 <- (a W_T + (1 - a) W_0 + l F H) / (1 + l F)          coordinate by coordinate

H are the weights as they were trained, home. F is the diagonal Fisher of the training set in units
of its mean (`relative_fisher`), a the share, l the elasticity. Without the penalty (l = 0) this is
the step W_0 + a (W_T - W_0) of Reptile (Nichol, Achiam, Schulman 2018), and with a = 1 the fast
weights simply go on. With it a coordinate on which the training set depends (l F >> 1) stays at
home, and one of which it says nothing (F = 0) moves freely.

Kirkpatrick et al. (2017, equation 3) add l/2 F (W - H)^2 to the loss of the new task and descend;
here the new task has been learnt already, by the rule, and its loss is replaced by the quadratic
around where the rule arrived, which gives the minimum in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metalm.meta.parameters import Parameters


@torch.no_grad()
def consolidate(
    slow: Mapping[str, Tensor],
    fast: Mapping[str, Tensor],
    home: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    share: float,
    elasticity: float,
) -> Parameters:
    """W_0 after a text: the minimum of the three quadratics above.

    Args:
        slow: W_0, where the text began, each ``[*shape]``.
        fast: W_T, where it ended.
        home: H.
        fisher: F >= 0, without a unit.
        share: a, from 0 (nothing is kept) to 1 (of the texts before, nothing but through W_T).
        elasticity: l >= 0; infinity puts every coordinate with F > 0 back home.

    Returns:
        New tensors.

    Raises:
        ValueError: a number outside these ranges, or mappings of other names or shapes.
    """
    _check_numbers(share, elasticity)
    _check_alike(slow, {"fast": fast, "home": home, "fisher": fisher})
    after: Parameters = {}
    for name, weight in slow.items():
        # Where F is 0 there is no pull, were it infinite elsewhere: 0 * inf is not a number.
        pull = torch.where(fisher[name] > 0, fisher[name] * elasticity, 0.0)
        free = torch.lerp(weight, fast[name], share)
        after[name] = torch.lerp(home[name], free, 1 / (1 + pull))
    return after


@torch.no_grad()
def relative_fisher(fisher: Mapping[str, Tensor]) -> Parameters:
    """F over its mean over all coordinates of all tensors, so that l means the same in any model.

    Raises:
        ValueError: F is negative or not finite somewhere, or zero everywhere.
    """
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in fisher.values())
    count = sum(tensor.numel() for tensor in fisher.values())
    least = min((float(tensor.min()) for tensor in fisher.values()), default=0.0)
    if not (0.0 < total < math.inf and least >= 0.0):
        raise ValueError(
            "this is no Fisher information; expected finite numbers >= 0, some above, found the "
            f"sum {total:g} and the least {least:g}; estimate it again, with more text"
        )
    return {name: tensor * (count / total) for name, tensor in fisher.items()}


def _check_numbers(share: float, elasticity: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(
            f"impossible share of what was read; expected 0 to 1, found {share}; change it"
        )
    if not elasticity >= 0.0:
        raise ValueError(
            f"impossible elasticity; expected a number >= 0, found {elasticity}; change it"
        )


def _check_alike(slow: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]) -> None:
    expected = {name: tuple(weight.shape) for name, weight in slow.items()}
    for what, given in others.items():
        found = {name: tuple(weight.shape) for name, weight in given.items()}
        if found != expected:
            name = min(name for name, _ in found.items() ^ expected.items())
            raise ValueError(
                f"the {what} weights do not fit the slow ones; expected {name} of shape "
                f"{expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}; give every "
                "mapping the same tensors"
            )
