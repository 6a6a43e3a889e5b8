"""A causal language model of Hugging Face `transformers` as `(tokens, state) -> (logits, state)`.

The state is the plain window of the tokens before, and a segment is run together with its window.
The past keys and values would be cheaper, but they were made by weights that have since changed,
absolute positions run out in them, and their classes differ from version to version. The window is
what fixed-length models are scored with anyway (the strided window of the `transformers` guide to
perplexity), it holds for every causal model, and all of it is seen with the newest weights. Nothing
of `transformers` is imported: the model that is handed over is called.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn


class CausalModel(nn.Module):
    """Calls `model(input_ids=...)` on the window and the new tokens, and keeps a new window.

    A segment of n tokens costs a run over context + n tokens. Names of parameters begin with
    ``model.``, such as ``model.transformer.h.0.mlp.c_fc.weight``.

    Args:
        model: such as `transformers.GPT2LMHeadModel`.
        context: tokens of the window; by default half of the positions that the model has, or 512
            where it does not say.

    Raises:
        ValueError: a negative context, or no room for a token beside it.
    """

    def __init__(self, model: nn.Module, context: int | None = None) -> None:
        super().__init__()
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if context is None:
            context = 512 if positions is None else min(512, positions // 2)
        if context < 0 or (positions is not None and context >= positions):
            raise ValueError(
                f"no room for this window; expected a context from 0 to below {positions}, the "
                f"model's positions, found {context}; change it"
            )
        self.model, self.context, self.positions = model, context, positions
        taken = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in taken

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores the token after each input.

        Args:
            tokens: int64 [batch, time].
            state: int64 [batch, window], the tokens before; None at the start.

        Returns:
            logits [batch, time, vocabulary] and the new window.

        Raises:
            ValueError: window and segment together are longer than the model's positions.
        """
        window = tokens if state is None else torch.cat((state, tokens), 1)
        if self.positions is not None and window.shape[1] > self.positions:
            raise ValueError(
                f"the segment is too long for the model; expected at most "
                f"{self.positions - self.context} tokens beside a context of {self.context}, found "
                f"{tokens.shape[1]}; use shorter segments or a smaller context"
            )
        time = tokens.shape[1]
        only = {"logits_to_keep": time} if self._keeps_logits else {}
        output = self.model(input_ids=window, use_cache=False, **only)
        return output.logits[:, -time:], window[:, max(0, window.shape[1] - self.context) :]
