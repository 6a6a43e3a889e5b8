"""An LSTM language model whose weights may be shared by the rows of a batch or owned by each row.

The regularisation is that of AWD-LSTM (Merity, Keskar, Socher 2018, section 4): variational
("locked") dropout on the activations, dropout on whole rows of the embedding, and DropConnect on
the recurrent weights. Input and output embedding are one tensor. `forward` reads its parameters
from the module, so that `torch.func.functional_call` can put fast weights in their place: any of
them may come with a leading `rows` dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalm.language.products import product, product_and_bias, product_type, without_autocast
from metalm.language.recurrence import LayerState, LayerWeights, lstm_layer

ModelState = tuple[LayerState, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size and regularisation of the language model."""

    vocabulary_size: int = 6000
    """Tokens, the end of line included; set to what the prepared data has."""
    embedding_size: int = 256
    """Size of the token vectors and of the last layer's output (tied)."""
    hidden_size: int = 640
    """Size of every layer but the last."""
    num_layers: int = 2
    """LSTM layers."""
    input_dropout: float = 0.1
    """Locked dropout on the token vectors."""
    hidden_dropout: float = 0.1
    """Locked dropout between layers."""
    output_dropout: float = 0.2
    """Locked dropout before the softmax."""
    embedding_dropout: float = 0.0
    """Probability that a token's vector is dropped everywhere in a batch."""
    weight_dropout: float = 0.0
    """DropConnect on the recurrent weights."""

    def __post_init__(self) -> None:
        """Checks sizes and probabilities."""
        for name in ("vocabulary_size", "embedding_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name} is a size; expected at least 1, found {getattr(self, name)}; "
                    "do raise it"
                )
        for name in ("input", "hidden", "output", "embedding", "weight"):
            value = getattr(self, f"{name}_dropout")
            if not 0.0 <= value < 1.0:
                raise ValueError(
                    f"model.{name}_dropout is a probability; expected 0 <= p < 1, found {value}; "
                    "do change it"
                )


class ModelOutput(NamedTuple):
    """What the model says about one segment."""

    logits: Tensor
    """[time, rows, vocabulary], of the token that follows each input."""
    features: Tensor
    """[time, rows, embedding], the last layer's output before dropout (the cache's keys)."""
    state: ModelState
    """Hidden state after the segment."""


class Activations(NamedTuple):
    """What the layers make of one segment: what the softmax is taken of, and what it is not."""

    features: Tensor
    """[time, rows, embedding], the last layer's output before dropout."""
    dropped: Tensor
    """[time, rows, embedding], the same after dropout."""
    weight: Tensor
    """The embedding, as the softmax takes it (see `_LookupOfTied`)."""
    state: ModelState
    """Hidden state after the segment."""


class LSTMLayer(nn.Module):
    """Owns the weights of one layer.

    Initialised as `torch.nn.LSTM` (uniform in 1/sqrt(hidden)), with 1 added to the forget gate's
    bias (Jozefowicz, Zaremba, Sutskever 2015, section 2.2): without it and the output bias below,
    long stretches of training are lost on a plateau at the unigram loss.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(hidden_size)
        self.hidden_size = hidden_size
        self.input_weight = nn.Parameter(
            torch.empty(4 * hidden_size, input_size).uniform_(-bound, bound)
        )
        self.hidden_weight = nn.Parameter(
            torch.empty(4 * hidden_size, hidden_size).uniform_(-bound, bound)
        )
        self.input_bias = nn.Parameter(torch.empty(4 * hidden_size).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.empty(4 * hidden_size).uniform_(-bound, bound))
        with torch.no_grad():
            self.hidden_bias[hidden_size : 2 * hidden_size] += 1.0  # gates are ordered i, f, g, o

    def forward(
        self, inputs: Tensor, state: LayerState, weight_dropout: float
    ) -> tuple[Tensor, LayerState]:
        """Runs the layer over [time, rows, inputs], with DropConnect on the recurrent weight."""
        hidden_weight: Tensor = self.hidden_weight
        if weight_dropout > 0.0:
            mask = hidden_weight.new_empty(hidden_weight.shape[-2:])
            mask.bernoulli_(1 - weight_dropout).div_(1 - weight_dropout)
            hidden_weight = hidden_weight * mask
        weights = LayerWeights(self.input_weight, hidden_weight, self.input_bias, self.hidden_bias)
        return lstm_layer(inputs, state, weights)


class LanguageModel(nn.Module):
    """LSTM language model with tied embeddings.

    Every row of a batch is one stream of text. `forward` takes the state and gives the next one;
    nothing is kept.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [config.hidden_size] * (config.num_layers - 1) + [config.embedding_size]
        inputs = [config.embedding_size, *sizes[:-1]]
        self.layer_sizes = tuple(sizes)
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)  # as AWD-LSTM does
        self.layers = nn.ModuleList(
            LSTMLayer(size_in, size) for size_in, size in zip(inputs, sizes, strict=True)
        )
        self.decoder = nn.Linear(config.embedding_size, config.vocabulary_size)
        self.decoder.weight = self.embedding.weight
        nn.init.zeros_(self.decoder.bias)

    @torch.no_grad()
    def start_from_frequencies(self, counts: Tensor) -> None:
        """Sets the output bias to the log frequency of each token, so that training starts there.

        Args:
            counts: [vocabulary], how often each token stands in the training text.
        """
        self.decoder.bias.copy_(((counts + 1.0) / (counts + 1.0).sum()).log())

    def initial_state(self, rows: int) -> ModelState:
        """Zero hidden state for `rows` streams."""
        like = self.embedding.weight
        return tuple(
            LayerState(like.new_zeros(rows, size), like.new_zeros(rows, size))
            for size in self.layer_sizes
        )

    def forward(self, tokens: Tensor, state: ModelState) -> ModelOutput:
        """Scores the token after each input.

        Args:
            tokens: int64 [time, rows], inputs in 0 .. vocabulary - 1.
            state: hidden state before the segment (`initial_state` at the start of a text).

        Returns:
            logits [time, rows, vocabulary], features [time, rows, embedding] and the next state.
        """
        seen = self.activations(tokens, state)
        return ModelOutput(self.logits(seen), seen.features, seen.state)

    def logits(self, seen: Activations) -> Tensor:
        """Logits [time, rows, vocabulary] of the token that follows each input."""
        return tied_logits(seen.dropped, seen.weight, self.decoder.bias)

    def activations(self, tokens: Tensor, state: ModelState) -> Activations:
        """Everything before the softmax; see `forward`."""
        config, training = self.config, self.training
        vectors, weight = _LookupOfTied.apply(self.embedding.weight, tokens)
        if training and config.embedding_dropout > 0.0:
            keep = 1 - config.embedding_dropout
            kept = vectors.new_empty(config.vocabulary_size).bernoulli_(keep) / keep
            vectors = vectors * kept[tokens].unsqueeze(-1)
        values = locked_dropout(vectors, config.input_dropout, training)
        states = []
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            drop = config.weight_dropout if training else 0.0
            values, after = layer(values, state[number], drop)
            states.append(after)
            if number < last:
                values = locked_dropout(values, config.hidden_dropout, training)
        features = values
        values = locked_dropout(values, config.output_dropout, training)
        return Activations(features, values, weight, tuple(states))


def detach_state(state: ModelState) -> ModelState:
    """The same numbers without their history (truncated backpropagation through time)."""
    return tuple(LayerState(layer.hidden.detach(), layer.cell.detach()) for layer in state)


def start_of(state: ModelState) -> ModelState:
    """The hidden state that one row begins an article with: zeros, each [hidden]."""
    return tuple(
        LayerState(torch.zeros_like(layer.hidden[0]), torch.zeros_like(layer.cell[0]))
        for layer in state
    )


def locked_dropout(values: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout with one mask a row for all time steps of [time, rows, size].

    Variational dropout of Gal and Ghahramani (2016), section 4.
    """
    if not training or probability == 0.0:
        return values
    mask = values.new_empty(1, *values.shape[1:]).bernoulli_(1 - probability)
    return values * mask.div_(1 - probability)


def tied_logits(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[time, rows, size] to [time, rows, vocabulary]; `weight` and `bias` shared or per row."""
    if weight.dim() == 2 and bias.dim() == 1:
        return torch.nn.functional.linear(values, weight, bias)
    rows_first = values.transpose(0, 1)
    if weight.dim() == 2:
        return (rows_first @ weight.t() + bias.unsqueeze(1)).transpose(0, 1)
    if bias.dim() == 1:
        bias = bias.expand(weight.shape[0], -1)
    logits: Tensor = _RowLogits.apply(product_type(values), rows_first.to(bias.dtype), weight, bias)
    return logits.transpose(0, 1)


class _RowLogits(torch.autograd.Function):
    """[rows, time, size] to [rows, time, vocabulary] with a weight and a bias per row.

    Autograd would form the weight's gradient transposed, and whoever uses it next would pay for a
    strided copy of `rows x vocabulary x size`.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, dtype: torch.dtype, values: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        converted = weight.to(dtype)
        ctx.save_for_backward(values, weight, converted)
        return product_and_bias(values, converted.transpose(1, 2), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, converted = ctx.saved_tensors
        _, to_values, to_weight, to_bias = ctx.needs_input_grad
        dtype = converted.dtype
        if torch.is_grad_enabled():  # for a second derivative the weight itself is on the graph
            converted = weight.to(dtype)
        return (
            None,
            product(gradient, converted) if to_values else None,
            product(gradient.transpose(1, 2), values.to(dtype)) if to_weight else None,
            gradient.sum(1) if to_bias else None,
        )


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
