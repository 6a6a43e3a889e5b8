"""The two published trainings of AWD-LSTM on WikiText-2, on its text as one stream.

    nt-asgd     Merity, Keskar, Socher 2018 (salesforce/awd-lstm-lm): SGD, then averages of it
    one-cycle   Gugger and Howard 2018 (sgugger/Adam-experiments): Adam in an eighth of the epochs

Both read the training text in its own order, cut into rows, with the hidden state carried from
window to window and zeros at the start of each pass; windows vary in length, and the loss has
penalties on the last layer's activations. They differ in how a step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metalm.language.network.layers import LSTMLayer
from metalm.language.network.model import LanguageModel, ModelState, detach_state
from metalm.language.network.prediction import at_least_float32
from metalm.language.network.recurrence import LayerState
from metalm.language.text.articles import ArticleSet
from metalm.language.text.row_share import (
    RowShare,
    are_one_piece,
    in_turn,
    own_parts,
    own_share,
    whole,
)
from metalm.language.text.streams import TokenStreams
from metalm.language.training.activation_regularisation import activation_penalty, slowness_penalty
from metalm.language.training.nt_asgd import NtAsgd
from metalm.language.training.one_cycle_adam import OneCycleAdam
from metalm.language.training.stream_loss import stream_loss
from metalm.language.training.window_lengths import WindowLengths, WindowPlan
from metalm.meta.parameters import Parameters
from metalm.meta.tree import join
from metalm.training import processes
from metalm.training.captured import Captured, clear_gradients
from metalm.training.checked_settings import refuse_below, refuse_outside
from metalm.training.precision import reduced_products
from metalm.training.state import pack, unpack


@dataclass(frozen=True, kw_only=True)
class AwdTrainingConfig:
    """A published training of the base; its numbers are those of nt-asgd, unless said otherwise."""

    recipe: Literal["off", "nt-asgd", "one-cycle"] = "off"
    """Which; off for the training of the section `base`."""
    start: str = ""
    """Folder of a run whose base this one goes on from; none named for random weights. One more,
    shorter cycle makes a base better (EXPERIMENTS.md)."""
    epochs: int = 750
    """Passes over the training text."""
    rows: int = 80
    """Parallel streams that the text is cut into."""
    window: int = 70
    """Mean tokens of a row between two steps."""
    short_windows: float = 0.05
    """Share of the windows that have half that mean."""
    window_spread: float = 5.0
    """Standard deviation of the windows' lengths."""
    shortest_window: int = 5
    """Lowest length of a window."""
    rate_follows_length: bool = True
    """Whether a window's learning rate is in proportion to its length."""
    learning_rate: float = 30.0
    """Of a window of mean length; one-cycle: the highest."""
    weight_decay: float = 1.2e-6
    """L2: this times the weights is added to the clipped gradient."""
    clip: float = 0.25
    """Highest norm of the gradient."""
    alpha: float = 2.0
    """Weight of the mean square of the last layer's output after dropout (AR)."""
    beta: float = 1.0
    """Weight of the mean square of its change from token to token, before dropout (TAR)."""
    non_monotone: int = 5
    """nt-asgd: epochs whose validation losses do not count when it is asked whether one is low."""
    phases: tuple[float, float, float, float] = (7.5, 37.5, 37.5, 7.5)
    """one-cycle: relative lengths of rise, plateau, fall and end."""
    division: float = 10.0
    """one-cycle: the rate begins at the highest over this, and comes back there before the end."""
    momenta: tuple[float, float] = (0.8, 0.7)
    """one-cycle: beta1 at the lowest and at the highest rate."""
    beta2: float = 0.99
    """one-cycle: second moment decay."""
    validation_rows: int = 10
    """Parallel streams of the validation text, which is read after each epoch."""
    bfloat16: Literal["off", "softmax", "all"] = "softmax"
    """Which matrix products are in bfloat16, where the hardware has it; all else is in float32."""

    def __post_init__(self) -> None:
        """Checks what would fail far from where it was set."""
        refuse_below(self, "awd", "epochs", "rows", "window", "shortest_window", "validation_rows")
        rates = ("learning_rate", "weight_decay", "clip", "alpha", "beta")
        refuse_outside(self, "awd", *rates, high=math.inf)
        if self.start and self.recipe == "off":
            raise ValueError(
                "a base that goes on from another has a published recipe; expected awd.recipe "
                f"nt-asgd or one-cycle where awd.start is named, found off and {self.start}; do "
                "choose a recipe, or leave out awd.start"
            )
        if min(self.phases) < 0 or sum(self.phases) <= 0:
            raise ValueError(
                "awd.phases are lengths; expected four numbers of at least 0 that are not all 0, "
                f"found {self.phases}; do change them"
            )

    @property
    def lengths(self) -> WindowLengths:
        """How long windows are."""
        return WindowLengths(
            self.window, self.short_windows, self.window_spread, self.shortest_window
        )


class Descent(Protocol):
    """How steps are taken, and which weights count."""

    def step(self, done: float, share: float) -> float:
        """One step on the gradients that are there; returns its learning rate."""
        ...

    @property
    def weights(self) -> Parameters:
        """Those to evaluate."""
        ...

    def end_epoch(self, loss: float) -> None:
        """Takes note of their validation loss."""
        ...

    @property
    def result(self) -> Parameters:
        """The weights that the training leaves."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the model's weights."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        ...


class Batch(NamedTuple):
    """A window of the text, each [time, rows]."""

    inputs: Tensor
    targets: Tensor


class AwdTraining:
    """One published training, as the loop of `metalm.training` takes it.

    Args:
        model: trained in place; `finish` leaves the result in it.
        articles: the training text.
        validation: read after each epoch, without learning.
        config: the recipe.
        seed: of the windows' lengths.
        accumulation: parts in which the rows are read, one after the other.

    Raises:
        ValueError: fewer rows than processes, or parts.
    """

    def __init__(
        self,
        model: LanguageModel,
        articles: ArticleSet,
        validation: ArticleSet,
        config: AwdTrainingConfig,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        self.model, self.config = model, config
        self.share, self.parts = own_share(config.rows), own_parts(config.rows, accumulation)
        self.streams = TokenStreams(articles, config.rows, 0, 0, shuffled=False)
        self.validation = TokenStreams(validation, config.validation_rows, 0, 0, shuffled=False)
        self.plan = WindowPlan(config.lengths, self.streams.length, config.epochs, seed)
        self.descent = _descent(model, config)
        self.state = model.initial_state(self.share.size)
        fits = model.fits_a_graph and are_one_piece(self.parts)
        self._captured = Captured(self._whole_step) if fits else None

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.plan.num_steps

    def step(self, index: int) -> dict[str, float]:
        """Reads one window of every row and takes one step; validates where an epoch ends."""
        config, window = self.config, self.plan.at(index)
        if window.start == 0:
            self.state = self.model.initial_state(self.share.size)
        self.model.train()
        batch = Batch(*self.streams.segment(window.start, window.length))
        losses = self._take_gradients(batch)
        processes.add_up([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        share = window.length / config.window if config.rate_follows_length else 1.0
        rate = self.descent.step(window.done, share)
        loss, penalties = processes.sums(*losses.double().sum(0).tolist())
        values = {
            "loss": loss,
            "penalty": penalties,
            "tokens": float(batch.targets.numel()),
            "learning_rate": rate,
            "gradient_norm": float(norm),
        }
        if window.is_last:
            found = stream_loss(self.model, self.descent.weights, self.validation, config.window)
            self.descent.end_epoch(found)
            values["validation_loss"] = found
        return values

    def finish(self) -> LanguageModel:
        """Puts the weights that the training leaves into the model, and gives it."""
        with torch.no_grad():
            for name, weight in self.descent.result.items():
                self.model.get_parameter(name).copy_(weight)
        return self.model

    def _take_gradients(self, batch: Batch) -> Tensor:
        """Loss and penalty of each part, [parts, 2]; leaves gradients and the next state."""
        if self._captured is not None:
            device = self.model.embedding.weight.device
            taken = [part.to(device) for part in batch]
            found, *after = self._captured(*taken, *chain.from_iterable(self.state))
            self.state = _as_state(after)
            return found
        self.model.zero_grad(set_to_none=True)
        losses, states = [], []
        for part in in_turn(self.parts):
            mean, penalty, state = self._losses(part, batch, self.state)
            (mean + penalty).backward()
            losses.append(torch.stack((mean, penalty)).detach())
            states.append(state)
        self.state, self.model.share = join(states), None
        return torch.stack(losses)

    def _whole_step(self, inputs: Tensor, targets: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The same of all rows at once, with gradients that stay where they are."""
        clear_gradients(self.model.parameters())
        batch = Batch(inputs, targets)
        mean, penalty, after = self._losses(self.parts[0], batch, _as_state(state))
        (mean + penalty).backward()
        return torch.stack((mean, penalty)).detach().unsqueeze(0), *chain.from_iterable(after)

    def _losses(
        self, part: RowShare, batch: Batch, state: ModelState
    ) -> tuple[Tensor, Tensor, ModelState]:
        """What these rows add to the mean loss of the batch and to its penalties; their state."""
        config, device = self.config, self.model.embedding.weight.device
        self.model.share = part.unless_whole()
        inputs, targets = (each.to(device) for each in part.columns(batch))
        with reduced_products(device, config.bfloat16 == "all"):
            seen = self.model.activations(inputs, part.within(self.share, state))
        with reduced_products(device, config.bfloat16 != "off"):
            loss = self.model.predict(seen).nats(targets).mean()
        penalty = activation_penalty(at_least_float32(seen.dropped), config.alpha)
        penalty = penalty + slowness_penalty(at_least_float32(seen.features), config.beta)
        weight = part.size / part.total
        return weight * loss, weight * penalty, detach_state(seen.state)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, optimiser, averages and hidden state; the place follows from the step."""
        return pack(
            {
                "model": self.model.state_dict(),
                "descent": self.descent.state_dict(),
                "state": whole(self.state, self.config.rows),
            }
        )

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        tree = unpack(tensors, meta)
        device = self.model.embedding.weight.device
        self.model.load_state_dict(tree["model"])
        self.descent.load_state_dict(tree["descent"])
        self.state = tuple(
            LayerState(*(part.to(device) for part in layer))
            for layer in self.share.of(tree["state"])
        )


def _as_state(tensors: Sequence[Tensor]) -> ModelState:
    """The h and c of each layer in turn, as the model takes them."""
    return tuple(LayerState(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True))


def start_as_published(model: LanguageModel) -> LanguageModel:
    """Takes back what `LSTMLayer` adds to the start of `torch.nn.LSTM`, in place.

    The recipes start from torch's own numbers: no 1 on the forget gates' biases, and 0, as the
    model begins with, for the output's.
    """
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, LSTMLayer):
                layer.hidden_bias[layer.hidden_size : 2 * layer.hidden_size] -= 1.0
    return model


def _descent(model: LanguageModel, config: AwdTrainingConfig) -> Descent:
    parameters: Parameters = dict(model.named_parameters())
    if config.recipe == "nt-asgd":
        return NtAsgd(
            parameters,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            interval=config.non_monotone,
        )
    if config.recipe == "one-cycle":
        return OneCycleAdam(
            parameters,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            phases=config.phases,
            division=config.division,
            momenta=config.momenta,
            beta2=config.beta2,
        )
    raise ValueError(
        f"no published training; expected awd.recipe 'nt-asgd' or 'one-cycle', found "
        f"{config.recipe!r}; choose one of them"
    )
