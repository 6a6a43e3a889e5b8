"""One table of token vectors for the input and for the softmax of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalm.language.network.prediction import FullPrediction
from metalm.language.network.row_linear import row_linear

SPREAD = 0.1
"""Half the width of the uniform distribution that token vectors start from, as in AWD-LSTM."""


class Tables(NamedTuple):
    """What the input hands on to the output; any of them may have a leading dimension of rows."""

    head: Tensor
    """[tokens, size]; with tails, [head tokens + tails, size], the vectors of the tails last."""
    tails: Sequence[Tensor] = ()
    """The vectors of each tail (`adaptive_softmax.py`), [tokens, own size]."""
    projections: Sequence[Tensor] = ()
    """Of each tail, [size, own size]."""


class TiedEmbedding(nn.Embedding):
    """The token vectors, at the input.

    Args:
        vocabulary_size: tokens.
        size: of a vector.
    """

    def __init__(self, vocabulary_size: int, size: int) -> None:
        super().__init__(vocabulary_size, size)
        nn.init.uniform_(self.weight, -SPREAD, SPREAD)

    def look_up(self, tokens: Tensor) -> tuple[Tensor, Tables]:
        """The vectors of tokens, and the table handed on to `TiedDecoder.predict`.

        Args:
            tokens: int64 [time, rows].

        Returns:
            [time, rows, size], and the table.
        """
        vectors, table = look_up(self.weight, tokens)
        return vectors, Tables(table)

    def make_decoder(self) -> TiedDecoder:
        """The output that shares this table."""
        return TiedDecoder(self)


class TiedDecoder(nn.Linear):
    """The token vectors, at the output: logits = W h + b.

    Args:
        embedding: has W.
    """

    def __init__(self, embedding: TiedEmbedding) -> None:
        super().__init__(embedding.embedding_dim, embedding.num_embeddings)
        self.weight = embedding.weight
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start_from_frequencies(self, counts: Tensor) -> None:
        """Sets the bias to the log frequency of each token.

        Args:
            counts: [vocabulary], how often each token stands in the training text.
        """
        self.bias.copy_(((counts + 1.0) / (counts + 1.0).sum()).log())

    def predict(self, values: Tensor, tables: Tables) -> FullPrediction:
        """What [time, rows, size] say of the next token, with the table that was handed on."""
        return FullPrediction(row_linear(values, tables.head, self.bias))


def look_up(table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of a tied table, and the table to be used at the output in place of the given one.

    Args:
        table: [tokens, size], or [rows, tokens, size].
        tokens: int64 [time, rows].

    Returns:
        [time, rows, size], and the table.
    """
    vectors, handed_on = _LookupOfTied.apply(table, tokens)
    return vectors, handed_on


class _LookupOfTied(torch.autograd.Function):
    """Rows of a tied embedding, and the embedding itself handed on to the softmax.

    The softmax's gradient of the tied tensor is dense; the lookup's touches a few rows of it.
    Because the lookup hands the tensor on, it receives that dense gradient and adds its own rows in
    place: with weights per article this saves a `rows x vocabulary x size` buffer and two passes
    over it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        size = weight.shape[-1]
        index = tokens
        if weight.dim() == 3:
            rows, vocabulary, _ = weight.shape
            index = tokens + torch.arange(rows, device=tokens.device) * vocabulary
        ctx.save_for_backward(index)
        ctx.weight_shape = weight.shape
        return weight.reshape(-1, size)[index], weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_vectors: Tensor, grad_weight: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        size = ctx.weight_shape[-1]
        grad_weight = grad_weight.contiguous()
        by_token = grad_vectors.to(grad_weight.dtype).reshape(-1, size)
        flat = grad_weight.view(-1, size)
        if torch.is_grad_enabled():
            return flat.index_add(0, index.reshape(-1), by_token).view(ctx.weight_shape), None
        flat.index_add_(0, index.reshape(-1), by_token)
        return grad_weight, None
