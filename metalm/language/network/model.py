"""A recurrent language model whose weights the rows of a batch may share, or each row may own.

The regularisation is that of AWD-LSTM (Merity, Keskar, Socher 2018, section 4): variational
("locked") dropout on the activations, dropout on whole rows of the embedding, and DropConnect in
the layers (`layers.py`: LSTM or QRNN). Input and output embedding are one tensor. `forward` reads
its parameters from the module, so that `torch.func.functional_call` can put fast weights in their
place: any of them may come with a leading `rows` dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from metalm.language.network.adaptive_softmax import AdaptiveEmbedding
from metalm.language.network.layers import AbstractLayer, Cell, make_layer
from metalm.language.network.prediction import AbstractPrediction
from metalm.language.network.recurrence import LayerState
from metalm.language.network.tied_embedding import Tables, TiedEmbedding
from metalm.language.text.row_share import RowShare
from metalm.training.checked_settings import refuse_below, refuse_outside

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
    cutoffs: tuple[int, ...] = ()
    """Where clusters of rarer tokens begin, in a vocabulary sorted by frequency (whole words are):
    adaptive input and softmax. Empty for one softmax over all tokens."""
    shrink: int = 4
    """By what the token vectors are smaller from one cluster to the next."""
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
        refuse_below(self, "model", "vocabulary_size", "embedding_size", "hidden_size")
        refuse_below(self, "model", "num_layers", "shrink")
        if any(b <= a for a, b in itertools.pairwise((0, *self.cutoffs))):
            raise ValueError(
                "model.cutoffs are the first tokens of clusters; expected rising numbers from 1 "
                f"on, found {', '.join(map(str, self.cutoffs))}; do sort them"
            )
        for name in ("input", "hidden", "output", "embedding", "weight"):
            refuse_outside(self, "model", f"{name}_dropout")


class ModelOutput(NamedTuple):
    """What the model says about one segment."""

    prediction: AbstractPrediction
    """Of the token that follows each input: `nats` and `scores` of targets."""
    features: Tensor
    """[time, rows, embedding], the last layer's output before dropout (the cache's keys)."""
    state: ModelState
    """Hidden state after the segment."""

    @property
    def logits(self) -> Tensor:
        """[time, rows, vocabulary], of the whole prediction."""
        return self.prediction.logits


class Activations(NamedTuple):
    """What the layers make of one segment: what the softmax is taken of, and what it is not."""

    features: Tensor
    """[time, rows, embedding], the last layer's output before dropout."""
    dropped: Tensor
    """[time, rows, embedding], the same after dropout."""
    tables: Tables
    """The embedding, handed on to the softmax (`tied_embedding.py`)."""
    state: ModelState
    """Hidden state after the segment."""


class LanguageModel(nn.Module):
    """Language model of LSTM or QRNN layers with tied embeddings.

    Every row of a batch is one stream of text. `forward` takes the state and gives the next one;
    nothing is kept.

    Attributes:
        share: the rows that are read here of a larger batch, for which dropout draws its masks;
            None where the batch is all there is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.share: RowShare | None = None
        sizes = [config.hidden_size] * (config.num_layers - 1) + [config.embedding_size]
        inputs = [config.embedding_size, *sizes[:-1]]
        self.embedding: TiedEmbedding | AdaptiveEmbedding
        vocabulary, size = config.vocabulary_size, config.embedding_size
        if config.cutoffs:
            self.embedding = AdaptiveEmbedding(vocabulary, size, config.cutoffs, config.shrink)
        else:
            self.embedding = TiedEmbedding(vocabulary, size)
        self.layers = nn.ModuleList(
            make_layer(config.cell, place, *both)
            for place, both in enumerate(zip(inputs, sizes, strict=True))
        )
        self.decoder = self.embedding.make_decoder()

    def start_from_frequencies(self, counts: Tensor) -> None:
        """Sets the output bias to the log frequency of each token, so that training starts there.

        Args:
            counts: [vocabulary], how often each token stands in the training text.
        """
        self.decoder.start_from_frequencies(counts)

    @property
    def fits_a_graph(self) -> bool:
        """Whether CUDA graphs can be captured of it: on a GPU, without an adaptive softmax.

        That one asks how many tokens each cluster has.
        """
        return self.embedding.weight.is_cuda and not self.config.cutoffs

    def initial_state(self, rows: int) -> ModelState:
        """Zero hidden state for `rows` streams."""
        return tuple(layer.initial_state(rows) for layer in self._layers())

    def forward(self, tokens: Tensor, state: ModelState) -> ModelOutput:
        """Scores the token after each input.

        Args:
            tokens: int64 [time, rows], inputs in 0 .. vocabulary - 1.
            state: hidden state before the segment (`initial_state` at the start of a text).

        Returns:
            the prediction, features [time, rows, embedding] and the next state.
        """
        seen = self.activations(tokens, state)
        return ModelOutput(self.predict(seen), seen.features, seen.state)

    def predict(self, seen: Activations) -> AbstractPrediction:
        """What is said of the token that follows each input; see `forward`."""
        return self.decoder.predict(seen.dropped, seen.tables)

    def activations(self, tokens: Tensor, state: ModelState) -> Activations:
        """Everything before the softmax; see `forward`."""
        config, training = self.config, self.training
        vectors, tables = self.embedding.look_up(tokens)
        if training and config.embedding_dropout > 0.0:
            keep = 1 - config.embedding_dropout
            kept = vectors.new_empty(config.vocabulary_size).bernoulli_(keep) / keep
            vectors = vectors * kept[tokens].unsqueeze(-1)
        values = locked_dropout(vectors, config.input_dropout, training, self.share)
        states = []
        last = len(self.layers) - 1
        for number, layer in enumerate(self._layers()):
            drop = config.weight_dropout if training else 0.0
            values, after = layer(values, state[number], drop)
            states.append(after)
            if number < last:
                values = locked_dropout(values, config.hidden_dropout, training, self.share)
        features = values
        values = locked_dropout(values, config.output_dropout, training, self.share)
        return Activations(features, values, tables, tuple(states))

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


def locked_dropout(
    values: Tensor, probability: float, training: bool, share: RowShare | None = None
) -> Tensor:
    """Dropout with one mask a row for all time steps of [time, rows, size].

    Variational dropout of Gal and Ghahramani (2016), section 4. Where the rows are a share of a
    larger batch, masks are drawn for all of it, so that they do not depend on who reads which.
    """
    if not training or probability == 0.0:
        return values
    rows = values.shape[1] if share is None else share.total
    mask = values.new_empty(1, rows, *values.shape[2:]).bernoulli_(1 - probability)
    if share is not None:
        mask = mask[:, share.start : share.stop]
    return values * mask.div_(1 - probability)
