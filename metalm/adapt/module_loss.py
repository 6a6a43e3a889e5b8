"""The loss of the next tokens under any language model, as the unroll of `metalm.meta` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalm.adapt.token_losses import by_surprise, far_from_sense, token_nats
from metalm.meta.inner_problem import TwoLosses
from metalm.meta.parameters import Parameters, call
from metalm.meta.tree import replace, tensors


class Segment(NamedTuple):
    """The next tokens of one text, [time], or of several, [texts, time]; int64."""

    inputs: Tensor
    """The token before each target."""
    targets: Tensor
    """The tokens to score."""


class SegmentScore(NamedTuple):
    """What is known of a segment before anything is learnt from it."""

    nats: Tensor
    """[time] or [texts, time], minus log probability of each target."""
    lost: Tensor
    """bool, [] or [texts]: far worse than a uniform guess."""
    tokens: Tensor
    """int64 [time] or [time, texts], the targets; a rule may look at them."""


class ModuleLoss:
    """Loss of a segment: the sum of its tokens' losses over the length of a full segment.

    So each token moves the weights equally far, also in a segment that is cut short.

    Args:
        module: ``(tokens, state) -> (logits, state)``.
        fast_names: parameters that have values of their own for each of several texts.
        segment: tokens in a full segment.
        batch_first: whether tokens are [batch, time] and logits [batch, time, vocabulary];
            otherwise [time, batch] and [time, batch, vocabulary].
        surprise: power of its loss by which a token weighs in what is learnt from.
    """

    def __init__(
        self,
        module: nn.Module,
        fast_names: Sequence[str],
        segment: int,
        batch_first: bool,
        surprise: float = 0.0,
    ) -> None:
        self.module, self.fast_names = module, frozenset(fast_names)
        self.segment, self.batch_first, self.surprise = segment, batch_first, surprise

    def __call__(
        self, parameters: Parameters, batch: Segment, state: Any
    ) -> tuple[Tensor | TwoLosses, SegmentScore, Any]:
        """Losses [] or [texts], the score of every token, and the next state of the module."""
        alone = batch.inputs.dim() == 1
        logits, state = (self._one if alone else self._several)(parameters, batch.inputs, state)
        nats = token_nats(logits, batch.targets)
        lost = far_from_sense(nats.detach().sum(-1), nats.shape[-1], logits.shape[-1])
        losses = nats.sum(-1) / self.segment
        found: Tensor | TwoLosses = losses
        if self.surprise:
            found = TwoLosses(losses, by_surprise(nats, self.surprise).sum(-1) / self.segment)
        tokens = batch.targets if alone else batch.targets.t()
        return found, SegmentScore(nats.detach(), lost, tokens), state

    def _one(self, parameters: Parameters, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.logits(parameters, inputs.unsqueeze(0), state)
        return logits.squeeze(0), state

    def _several(self, parameters: Parameters, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Each text with its own fast weights and a batch of one, through `torch.vmap`."""
        fast = {name: weight for name, weight in parameters.items() if name in self.fast_names}
        rest = {name: weight for name, weight in parameters.items() if name not in fast}
        forms: list[Any] = []

        def one(
            fast: Parameters, inputs: Tensor, before: list[Tensor]
        ) -> tuple[Tensor, list[Tensor]]:
            logits, after = self._one({**rest, **fast}, inputs, replace(state, before))
            forms.append(after)
            return logits, tensors(after)

        try:
            logits, after = torch.vmap(one)(fast, inputs, tensors(state))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "this model cannot read several texts at once; expected one that torch.vmap runs, "
                f"found '{str(error).splitlines()[0]}'; leave together at 1"
            ) from error
        return logits, replace(forms[0], after)

    def logits(self, parameters: Parameters, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Calls the module in its own layout.

        Args:
            parameters: in place of the module's own.
            inputs: int64 [batch, time].
            state: what the module gave before, or what it starts from.

        Returns:
            logits [batch, time, vocabulary] and the next state.

        Raises:
            ValueError: the module gives something else; the message says what.
        """
        output = call(self.module, parameters, inputs if self.batch_first else inputs.t(), state)
        logits, state = _parts(output)
        if not self.batch_first and logits.dim() == 3:
            logits = logits.transpose(0, 1)
        if logits.dim() != 3 or logits.shape[:2] != inputs.shape:
            layout = "[batch, time, vocabulary]" if self.batch_first else "[time, batch, ...]"
            raise ValueError(
                f"the model's logits have another shape; expected {layout} for a batch of "
                f"{inputs.shape[0]} and {inputs.shape[1]} tokens, found the shape "
                f"{list(logits.shape)}; check batch_first"
            )
        return logits, state


def _parts(output: Any) -> tuple[Tensor, Any]:
    if hasattr(output, "logits") and hasattr(output, "state"):
        return output.logits, output.state
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
        return output
    raise ValueError(
        "the model gave something else than expected; expected (logits, state), found "
        f"{type(output).__name__}; wrap it in a module that takes (tokens, state) and gives these"
    )
