"""The loss of one segment of every row, as the unroll of `metalm.meta` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalm.adapt.token_losses import (
    by_surprise,
    check_surprise,
    far_from_sense,
    token_nats,
)
from metalm.language.network.model import LanguageModel, ModelState
from metalm.language.network.prediction import at_least_float32, is_finite
from metalm.language.network.recurrence import LayerState
from metalm.language.text.article_batches import SegmentBatch
from metalm.meta.inner_problem import TwoLosses
from metalm.meta.parameters import Parameters, call


class SegmentScore(NamedTuple):
    """What is known of a segment before anything is learnt from it."""

    nats: Tensor
    """[time, rows], minus log probability of each target; 0 where the row has ended."""
    features: Tensor
    """[time, rows, embedding], the model's last output."""
    confidence: Tensor | None = None
    """[2, time, rows]: `confidence` of the logits, where it was asked for."""
    tempered: Tensor | None = None
    """[temperatures, time, rows], `nats` under other temperatures, where they were asked for."""
    tokens: Tensor | None = None
    """int64 [time, rows], the tokens that were scored; ends of line where the row has ended."""


class SegmentLoss:
    """Loss of a segment per row: the sum of its tokens' losses over the length of a full segment.

    So each token moves the weights equally far; in a full segment it is the mean, as Krause et al.
    have it. What comes out is at least float32, whatever autocast makes of the model's products.

    Args:
        model: called with the parameters it is given.
        segment: tokens in a full segment.
        confidence: whether the score says how sure the model was.
        temperatures: under which the tokens are scored too; the loss stays that of temperature 1.
        surprise: what is learnt from weighs each token by its own loss to this power
            (`by_surprise`); what counts, and the scores, stay what they are.

    Raises:
        ValueError: a negative surprise.
    """

    def __init__(
        self,
        model: LanguageModel,
        segment: int,
        *,
        confidence: bool = False,
        temperatures: Sequence[float] = (),
        surprise: float = 0.0,
    ) -> None:
        check_surprise(surprise)
        self.model, self.segment = model, segment
        self.confidence, self.surprise = confidence, surprise
        self.temperatures = tuple(temperatures)

    def __call__(
        self, parameters: Parameters, batch: SegmentBatch, state: ModelState
    ) -> tuple[Tensor | TwoLosses, SegmentScore, ModelState]:
        """Losses [rows], the score of every token, and the next hidden state."""
        output = call(self.model, parameters, batch.inputs, state)
        nats = output.prediction.scores(batch.targets) * batch.mask
        losses = nats.sum(0) / self.segment
        found: Tensor | TwoLosses = losses
        if self.surprise:
            found = TwoLosses(losses, by_surprise(nats, self.surprise).sum(0) / self.segment)
        sure = tempered = None
        with torch.no_grad():
            if self.confidence:
                sure = confidence(at_least_float32(output.logits))
            if self.temperatures:
                logits = at_least_float32(output.logits)
                tempered = tempered_nats(logits, batch.targets, self.temperatures) * batch.mask
        features = at_least_float32(output.features.detach())
        score = SegmentScore(nats.detach(), features, sure, tempered, batch.targets)
        state = tuple(LayerState(*map(at_least_float32, layer)) for layer in output.state)
        return found, score, state


def lost_rows(score: SegmentScore, batch: SegmentBatch, vocabulary_size: int) -> Tensor:
    """Which rows scored far worse than a uniform guess, bool [rows]: their fast weights misled."""
    return far_from_sense(score.nats.sum(0), batch.mask.sum(0), vocabulary_size)


def confidence(logits: Tensor) -> Tensor:
    """How sure the model is before the token comes.

    Where the logits are not finite it is the uniform distribution that speaks (`prediction.py`).

    Args:
        logits: [time, rows, vocabulary].

    Returns:
        [2, time, rows]: the highest log probability, and the entropy in nats.
    """
    said = is_finite(logits).unsqueeze(-1)
    logs = torch.where(said, logits, 0.0).log_softmax(-1)
    return torch.stack((logs.amax(-1), torch.special.entr(logs.exp()).sum(-1)))


def tempered_nats(logits: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
    """`token_nats` of the logits over each temperature, [temperatures, time, rows]."""
    return torch.stack(
        [token_nats(logits / each, targets, is_finite(logits)) for each in temperatures]
    )
