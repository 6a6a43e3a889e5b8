"""Input and output for a large vocabulary: rare tokens in clusters, with smaller vectors.

Tokens are sorted by frequency. The first, up to the first cutoff, are the *head*, with vectors w of
the full size d; the tokens between two cutoffs (the last being the end of the vocabulary) are a
*tail*, with vectors of size d_i = d / shrink^i, which a projection P_i [d, d_i] brings to size d:

    input:   x = w of a head token, P_i w of a token of tail i
    output:  p(token) = softmax over head tokens and tails (W h + b)              head token
             p(token) = p(tail i) softmax within tail i (W_i P_i^T h + b_i)       token of tail i

The output is the adaptive softmax of Grave et al. (2017, section 4), the input that of Baevski and
Auli (2019, section 3), and both share vectors and projections, as the latter have it on
WikiText-103. The head has no projection, since the last layer has its size, and there are biases,
so that training starts at the frequencies of the tokens.

**What is computed.** The head everywhere; a tail only where a target belongs to it, which is where
the time is saved. In training the tokens of a tail are gathered from all rows. In reading each row
gathers its own, and they are scored in chunks of a fixed number of places (`scores`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from metalm.adapt.token_losses import token_nats
from metalm.language.network.prediction import (
    AbstractPrediction,
    at_least_float32,
    cross_entropy,
    is_finite,
)
from metalm.language.network.row_linear import row_linear
from metalm.language.network.tied_embedding import SPREAD, Tables, look_up

# Tokens of a tail that a row scores together. A segment of 20 tokens rarely has more of one tail,
# and up to here the time goes into reading the weights.
_CHUNK = 4


class AdaptiveEmbedding(nn.Module):
    """The token vectors, at the input.

    All vectors start as they do in a full embedding; the projections so that vectors and logits of
    tails are spread like those of the head.

    Args:
        vocabulary_size: tokens, sorted by frequency, the most frequent first.
        size: d.
        cutoffs: the first token of each tail.
        shrink: by what vectors are smaller from one cluster to the next.

    Raises:
        ValueError: a tail without a token.
    """

    def __init__(
        self, vocabulary_size: int, size: int, cutoffs: Sequence[int], shrink: int
    ) -> None:
        super().__init__()
        if cutoffs[-1] >= vocabulary_size:
            raise ValueError(
                f"the last cluster has no token; expected cutoffs below the {vocabulary_size} "
                f"tokens of the vocabulary, found {cutoffs[-1]}; lower model.cutoffs or leave it "
                "out"
            )
        self.ranges = [range(*ends) for ends in itertools.pairwise((*cutoffs, vocabulary_size))]
        self.weight = nn.Parameter(torch.empty(cutoffs[0] + len(cutoffs), size))
        nn.init.uniform_(self.weight, -SPREAD, SPREAD)
        self.tails = nn.ModuleList(
            _Tail(len(tokens), max(1, size // shrink**number), size)
            for number, tokens in enumerate(self.ranges, 1)
        )

    def look_up(self, tokens: Tensor) -> tuple[Tensor, Tables]:
        """The vectors of tokens, and the tables handed on to `AdaptiveDecoder.predict`.

        Args:
            tokens: int64 [time, rows].

        Returns:
            [time, rows, size], and the tables.
        """
        vectors, head = look_up(self.weight, tokens.where(tokens < self.ranges[0].start, 0))
        tables: list[Tensor] = []
        projections: list[Tensor] = []
        for part, tokens_of_tail in zip(self.tails, self.ranges, strict=True):
            tail, inside = cast(_Tail, part), _inside(tokens, tokens_of_tail)
            # All places are looked up and projected, so that the shape of the product does not
            # depend on the text.
            found, table = look_up(tail.weight, (tokens - tokens_of_tail.start).where(inside, 0))
            vectors = torch.where(inside.unsqueeze(-1), _project(found, tail.projection), vectors)
            tables.append(table)
            projections.append(tail.projection)
        return vectors, Tables(head, tables, projections)

    def make_decoder(self) -> AdaptiveDecoder:
        """The output that shares these tables."""
        return AdaptiveDecoder(self.ranges)


class _Tail(nn.Module):
    """Vectors of the tokens of a tail, and their projection."""

    def __init__(self, tokens: int, own_size: int, size: int) -> None:
        super().__init__()
        bound = math.sqrt(3.0 / own_size)  # a variance of 1 / own_size
        self.weight = nn.Parameter(torch.empty(tokens, own_size).uniform_(-SPREAD, SPREAD))
        self.projection = nn.Parameter(torch.empty(size, own_size).uniform_(-bound, bound))


class AdaptiveDecoder(nn.Module):
    """The output: its own are the biases, [vocabulary + tails], those of the tails last.

    Args:
        ranges: the tokens of each tail.
    """

    def __init__(self, ranges: Sequence[range]) -> None:
        super().__init__()
        self.ranges = ranges
        self.bias = nn.Parameter(torch.zeros(ranges[-1].stop + len(ranges)))

    @torch.no_grad()
    def start_from_frequencies(self, counts: Tensor) -> None:
        """Sets the biases to the log frequencies of tokens and tails.

        Args:
            counts: [vocabulary], how often each token stands in the training text.
        """
        shares = (counts + 1.0) / (counts + 1.0).sum()
        of_tails = [shares[tokens.start : tokens.stop].sum() for tokens in self.ranges]
        self.bias.copy_(torch.cat((shares, torch.stack(of_tails))).log())

    def predict(self, values: Tensor, tables: Tables) -> AdaptivePrediction:
        """What [time, rows, d] say of the next token, with the tables that were handed on."""
        bias, first = self.bias, self.ranges[0].start
        of_head = torch.cat((bias[..., :first], bias[..., self.ranges[-1].stop :]), -1)
        tails = [
            TailPrediction(
                tokens,
                _project(values, projection.mT),
                table,
                bias[..., tokens.start : tokens.stop],
            )
            for tokens, table, projection in zip(
                self.ranges, tables.tails, tables.projections, strict=True
            )
        ]
        return AdaptivePrediction(row_linear(values, tables.head, of_head), tails)


class TailPrediction(NamedTuple):
    """What is needed to say how likely each token of a tail is, given that it is one of them."""

    tokens: range
    """The tokens of the tail."""
    values: Tensor
    """[time, rows, d_i], P_i^T h."""
    weight: Tensor
    """[tokens, d_i], or [rows, tokens, d_i]."""
    bias: Tensor
    """[tokens], or [rows, tokens]."""

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same weights."""
        return self.weight.dim() == 2 and self.bias.dim() == 1


class AdaptivePrediction(AbstractPrediction):
    """A softmax over the head and the tails, and one within each tail.

    A softmax whose logits are not finite is replaced by the uniform distribution in `logits` and
    `scores`: in the head over the vocabulary, in a tail over its tokens.

    Args:
        head: logits [time, rows, head tokens + tails].
        tails: one for each tail.
    """

    def __init__(self, head: Tensor, tails: Sequence[TailPrediction]) -> None:
        self.head, self.tails = head, tails

    @property
    def logits(self) -> Tensor:
        """Log probabilities [time, rows, vocabulary]; computed anew each time."""
        first, end = self.tails[0].tokens.start, self.tails[-1].tokens.stop
        head = at_least_float32(self.head).log_softmax(-1)
        parts = [head[..., :first]]
        for number, tail in enumerate(self.tails, first):
            found = at_least_float32(row_linear(tail.values, tail.weight, tail.bias))
            said = is_finite(found).unsqueeze(-1)
            within = torch.where(said, found.log_softmax(-1), -math.log(len(tail.tokens)))
            parts.append(head[..., number, None] + within)
        said = is_finite(self.head).unsqueeze(-1)
        return torch.where(said, torch.cat(parts, -1), -math.log(end))

    def nats(self, targets: Tensor) -> Tensor:  # noqa: D102 - of the interface
        if not all(tail.is_shared for tail in self.tails):
            return self.scores(targets)
        total = cross_entropy(self.head, self._in_head(targets)).flatten()
        for tail in self.tails:
            places = _inside(targets, tail.tokens).flatten().nonzero().squeeze(1)
            if len(places) > 0:
                values = tail.values.flatten(0, 1)[places].unsqueeze(1)
                local = targets.flatten()[places].unsqueeze(1) - tail.tokens.start
                found = cross_entropy(row_linear(values, tail.weight, tail.bias), local)
                total = total.index_add(0, places, found.squeeze(1))
        return total.view_as(targets)

    def scores(self, targets: Tensor) -> Tensor:
        """Minus log probability of each target; no bit depends on later tokens or other rows.

        A matrix product rounds differently with another number of rows, so the number of tokens
        that are scored together must not follow from the text. Each row's places are ordered, those
        whose target is of the tail first, in the order of time; the tail is computed for the first
        few places of every row, then for the next few, until all of its targets are scored. So the
        product that a token takes part in has a shape that is known beforehand, and the token's
        place in it follows from the targets before it in its own row.
        """
        total = cross_entropy(self.head, self._in_head(targets))
        for tail in self.tails:
            inside = _inside(targets, tail.tokens)
            order = inside.byte().argsort(dim=0, descending=True, stable=True)
            counts = inside.sum(0)
            for start in range(0, int(counts.max()), _CHUNK):
                places = order[start : start + _CHUNK]
                values = tail.values.gather(
                    0, places.unsqueeze(-1).expand(-1, -1, tail.values.shape[-1])
                )
                within = row_linear(values, tail.weight, tail.bias)
                local = targets.gather(0, places) - tail.tokens.start
                local = local.clamp(0, len(tail.tokens) - 1)
                found = token_nats(within, local, is_finite(within))
                number = torch.arange(start, start + len(places), device=targets.device)
                found = torch.where(number.unsqueeze(1) < counts, found, 0.0)
                total = total.scatter_add(0, places, found)
        size = self.tails[-1].tokens.stop
        return torch.where(is_finite(self.head), total, math.log(size))

    def _in_head(self, targets: Tensor) -> Tensor:
        """The targets of the head's softmax: its own tokens, and the tails of the others."""
        first = self.tails[0].tokens.start
        found = targets
        for number, tail in enumerate(self.tails, first):
            found = found.masked_fill(_inside(targets, tail.tokens), number)
        return found


def _inside(tokens: Tensor, of_tail: range) -> Tensor:
    return (tokens >= of_tail.start) & (tokens < of_tail.stop)


def _project(values: Tensor, projection: Tensor) -> Tensor:
    """P x, [time, rows, outputs]."""
    return row_linear(values, projection, projection.new_zeros(projection.shape[-2]))
