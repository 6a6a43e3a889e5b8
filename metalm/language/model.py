"""A recurrent language model whose weights the rows of a batch may share, or each row may own.

The regularisation is that of AWD-LSTM (Merity, Keskar, Socher 2018, section 4): variational
("locked") dropout on the activations, dropout on whole rows of the embedding, and DropConnect in
the layers (`layers.py`: LSTM or QRNN). Input and output embedding are one tensor. `forward` reads
its parameters from the module, so that `torch.func.functional_call` can put fast weights in their
place: any of them may come with a leading `rows` dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from metalm.language.layers import AbstractLayer, Cell, make_layer
from metalm.language.recurrence import LayerState
from metalm.language.row_linear import row_linear

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
    """Recurrent layers."""
    cell: Cell = "lstm"
    """Of every layer: lstm, or qrnn (quasi-recurrent)."""
    input_dropout: float = 0.1
    """Locked dropout on the token vectors."""
    hidden_dropout: float = 0.1
    """Locked dropout between layers."""
    output_dropout: float = 0.2
    """Locked dropout before the softmax."""
    embedding_dropout: float = 0.0
    """Probability that a token's vector is dropped everywhere in a batch."""
    weight_dropout: float = 0.0
    """DropConnect on the recurrent weights (LSTM) or on the layers' only weights (QRNN)."""

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


class LanguageModel(nn.Module):
    """Language model of LSTM or QRNN layers with tied embeddings.

    Every row of a batch is one stream of text. `forward` takes the state and gives the next one;
    nothing is kept.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [config.hidden_size] * (config.num_layers - 1) + [config.embedding_size]
        inputs = [config.embedding_size, *sizes[:-1]]
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)  # as AWD-LSTM does
        self.layers = nn.ModuleList(
            make_layer(config.cell, place, *both)
            for place, both in enumerate(zip(inputs, sizes, strict=True))
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
        return tuple(layer.initial_state(rows) for layer in self._layers())

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
        return row_linear(seen.dropped, seen.weight, self.decoder.bias)

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
        for number, layer in enumerate(self._layers()):
            drop = config.weight_dropout if training else 0.0
            values, after = layer(values, state[number], drop)
            states.append(after)
            if number < last:
                values = locked_dropout(values, config.hidden_dropout, training)
        features = values
        values = locked_dropout(values, config.output_dropout, training)
        return Activations(features, values, weight, tuple(states))

    def _layers(self) -> list[AbstractLayer]:
        return cast("list[AbstractLayer]", list(self.layers))


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
