"""Ordinary training of the language model, with truncated backpropagation through time.

Articles are read in rows, the hidden state starting at zero with each, as in meta-training. The
base model and its control come from one recipe: the control goes on, still without adaptation, for
as many tokens as the meta-learner reads, under the same schedule. It is the base on which the
rivals are run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalm.language.network.model import LanguageModel, ModelState, detach_state, start_of
from metalm.language.network.recurrence import LayerState
from metalm.language.text.article_batches import SegmentBatch, set_rows
from metalm.language.text.article_passes import ArticlePasses
from metalm.language.text.articles import ArticleSet
from metalm.language.text.row_share import RowShare, in_turn, own_parts, own_share, whole
from metalm.meta.tree import join
from metalm.training import processes
from metalm.training.checked_settings import refuse_below, refuse_outside
from metalm.training.precision import reduced_products
from metalm.training.state import pack, unpack


@dataclass(frozen=True, kw_only=True)
class BaseTrainingConfig:
    """Ordinary training: AdamW under a one-cycle schedule.

    Where the base is trained by a published recipe (section `awd`), of the control alone.
    """

    tokens: int = 16_000_000
    """Tokens read by the base."""
    rows: int = 32
    """Articles read at once."""
    window: int = 64
    """Tokens a row reads between two steps of the optimiser."""
    learning_rate: float = 2.5e-3
    """Highest learning rate."""
    warm_up: float = 0.02
    """Share of the whole schedule (base and control) in which the rate rises."""
    final_rate: float = 0.01
    """Learning rate at the end of the schedule, as a share of the highest."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta2: float = 0.99
    """Second moment decay of AdamW."""
    clip: float = 0.25
    """Highest norm of the gradient."""
    bfloat16: bool = True
    """Matrix products in bfloat16 where the hardware has it; weights and losses in float32."""

    def __post_init__(self) -> None:
        """Checks sizes and shares."""
        refuse_below(self, "base", "tokens", "rows", "window")
        refuse_outside(self, "base", "warm_up", "beta2")
        rates = ("learning_rate", "final_rate", "weight_decay", "clip")
        refuse_outside(self, "base", *rates, high=math.inf)

    @property
    def tokens_per_step(self) -> int:
        """Tokens between two steps of the optimiser."""
        return self.rows * self.window

    def steps(self, tokens: int) -> int:
        """Steps of the optimiser that read about so many tokens."""
        return max(1, round(tokens / self.tokens_per_step))


def one_cycle(progress: float, warm_up: float, final_rate: float) -> float:
    """Learning rate, as a share of the highest, after a share `progress` of the schedule.

    Linear rise, then half a cosine down to `final_rate` (Smith 2018, with cosine annealing).
    """
    if progress < warm_up:
        return progress / warm_up
    along = min(1.0, (progress - warm_up) / (1.0 - warm_up))
    return final_rate + (1.0 - final_rate) * 0.5 * (1.0 + math.cos(math.pi * along))


class BaseTraining:
    """One training of the language model, as the loop of `metalm.training` takes it.

    Args:
        model: trained in place.
        articles: what it reads, again and again, each pass in its own order.
        config: the recipe.
        schedule: share of the highest learning rate at step `index`.
        seed: of the order of the articles.
        optimizer_state: of the training that this one goes on from.
        accumulation: parts in which the rows are read, one after the other.

    Raises:
        ValueError: fewer rows than processes, or parts.
    """

    def __init__(
        self,
        model: LanguageModel,
        articles: ArticleSet,
        config: BaseTrainingConfig,
        schedule: Callable[[int], float],
        seed: int,
        optimizer_state: Mapping[str, Any] | None = None,
        accumulation: int = 1,
    ) -> None:
        self.model, self.config = model, config
        self.share, self.parts = own_share(config.rows), own_parts(config.rows, accumulation)
        self.schedule = schedule
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        if optimizer_state is not None:
            self.optimizer.load_state_dict(dict(optimizer_state))
        self.passes = ArticlePasses(articles, config.rows, seed)
        self.state = model.initial_state(self.share.size)

    def step(self, index: int) -> dict[str, float]:
        """Reads one window of every row and takes one step of the optimiser."""
        config = self.config
        entered = self.share.places(self.passes.rows.enter())
        set_rows(self.state, entered, start_of(self.state))
        device = self.model.embedding.weight.device
        batch = self.passes.rows.take(config.window, device)
        tokens = batch.mask.sum()
        rate = config.learning_rate * self.schedule(index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses, states = [], []
        for part in in_turn(self.parts):
            loss, state = self._read(part, batch)
            loss = loss / tokens
            loss.backward()
            losses.append(loss.detach())
            states.append(state)
        self.state = join(states)
        processes.add_up([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        return {
            "loss": processes.sums(torch.stack(losses).sum().item())[0],
            "tokens": float(tokens),
            "learning_rate": rate,
            "gradient_norm": float(norm),
        }

    def _read(self, part: RowShare, batch: SegmentBatch) -> tuple[Tensor, ModelState]:
        """The summed loss of these rows, and their next hidden state."""
        self.model.share = part.unless_whole()
        inputs, targets, mask = part.columns(batch)
        with reduced_products(inputs.device, self.config.bfloat16):
            output = self.model(inputs, part.within(self.share, self.state))
            nats = output.prediction.nats(targets)
        return (nats * mask).sum(), detach_state(output.state)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, optimiser, hidden state and position in the text."""
        return pack(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": whole(self.state, self.config.rows),
                "passes": self.passes.state_dict(),
            }
        )

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        tree = unpack(tensors, meta)
        device = self.model.embedding.weight.device
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.passes.load_state_dict(tree["passes"])
        self.state = tuple(
            LayerState(*(part.to(device) for part in layer))
            for layer in self.share.of(tree["state"])
        )
