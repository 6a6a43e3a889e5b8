"""Training the update rule, alone or together with the model's slow weights, by reading articles.

A step reads `unroll` segments of every row: each segment is scored, then learnt from, and the
meta-gradient of all scores goes through those updates. Between steps the history is cut, not the
reading: hidden states and fast weights go on, and what a row has learnt, its displacement from W_0,
is held constant (`rebase`). In forward mode nothing is cut: each score's gradient goes through
every update since the row's article began; on a GPU a step is then one CUDA graph.

Most rows begin each article from W_0. Some may read on across articles instead (`carry_rows`), so
that the rule learns to let go of the last article by itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from metalm.language.network.model import LanguageModel, start_of
from metalm.language.network.recurrence import LayerState, twice_differentiable
from metalm.language.network.segment_loss import SegmentLoss, SegmentScore, lost_rows
from metalm.language.text.article_batches import SegmentBatch, select_first, select_rows, set_rows
from metalm.language.text.article_passes import ArticlePasses
from metalm.language.text.articles import ArticleSet
from metalm.language.text.row_share import (
    RowShare,
    are_one_piece,
    in_turn,
    own_parts,
    own_share,
    whole,
)
from metalm.language.training.meta_training_config import JointTrainingConfig, MetaTrainingConfig
from metalm.meta.forward_mode import initial_traces
from metalm.meta.parameters import Parameters, split
from metalm.meta.tree import replace, tensors, transform, write
from metalm.meta.unroll import State, Unrolled, unroll
from metalm.meta.update_rule import AbstractUpdateRule
from metalm.training import processes
from metalm.training.captured import Captured, clear_gradients
from metalm.training.precision import reduced_products
from metalm.training.state import pack, unpack

PATIENCE = 2
"""Steps before they are captured as a CUDA graph, where they are."""


class MetaTraining:
    """Reads articles in rows and trains the rule, and W_0 where the model is not frozen.

    Args:
        model: W_0; trained in place if `model_optimizer` is given.
        rule: trained in place; it names the fast weights.
        articles: what is read, again and again, each pass in its own order.
        config: the recipe.
        schedule: share of the rule's learning rate at step `index`.
        seed: of the order of the articles.
        model_optimizer: for W_0 and the rest of the model; None leaves the model frozen.
        model_schedule: the optimiser's learning rate at step `index`.
        accumulation: parts in which the rows are read, one after the other.

    Raises:
        ValueError: fewer rows than processes, or parts.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: AbstractUpdateRule,
        fast_names: Sequence[str],
        articles: ArticleSet,
        config: MetaTrainingConfig,
        schedule: Callable[[int], float],
        seed: int,
        model_optimizer: torch.optim.Optimizer | None = None,
        model_schedule: Callable[[int], float] | None = None,
        accumulation: int = 1,
    ) -> None:
        self.model, self.rule, self.config = model, rule, config
        self.share, self.parts = own_share(config.rows), own_parts(config.rows, accumulation)
        self.schedule = schedule
        self.model_optimizer, self.model_schedule = model_optimizer, model_schedule
        model.train(isinstance(config, JointTrainingConfig) and config.dropout)
        model.requires_grad_(model_optimizer is not None)
        self.slow, self.rest = split(model, fast_names)
        self.optimizer = torch.optim.Adam(rule.parameters(), lr=config.learning_rate)
        self.loss = SegmentLoss(model, config.segment, surprise=config.surprise)
        self.passes = ArticlePasses(articles, config.rows, seed, config.carry_rows)
        self.fast: Parameters = {
            name: weight.detach().expand(self.share.size, *weight.shape).clone()
            for name, weight in self.slow.items()
        }
        self.state = model.initial_state(self.share.size)
        self.rule_state = rule.initial_state(self.fast)
        self.traces = None if config.mode == "reverse" else initial_traces(rule, self.fast)
        self._captured = self._new_captured()

    def step(self, index: int) -> dict[str, float]:
        """Reads `unroll` segments in every row and takes one step of the optimisers."""
        with twice_differentiable() if self.config.order == 2 else nullcontext():
            return self._step(index)

    def _step(self, index: int) -> dict[str, float]:
        config = self.config
        self._begin_articles()
        taken = [self.passes.rows.take(config.segment) for _ in range(config.unroll)]
        tokens = sum(float(batch.mask.sum()) for batch in taken)
        device = self.model.embedding.weight.device
        batches = [SegmentBatch(*(part.to(device) for part in batch)) for batch in taken]
        read = self._read_by_parts if self._captured is None else self._read_at_once
        mean, lost = read(batches, config.segment / tokens)
        gradients = [parameter.grad for parameter in self._learned()]
        processes.add_up([gradient for gradient in gradients if gradient is not None])
        values = self._optimise(index)
        loss, fallbacks = processes.sums(mean.item(), self._fall_back(lost))
        return {"loss": loss, "tokens": tokens} | values | {"fallbacks": float(fallbacks)}

    def _read_by_parts(
        self, batches: Sequence[SegmentBatch], weight: float
    ) -> tuple[Tensor, Tensor]:
        """The mean loss and which rows were lost; leaves gradients.

        Args:
            batches: the next segments.
            weight: how much each of their losses counts.
        """
        for parameter in self._learned():
            parameter.grad = None
        losses, lost = [], []
        for part in in_turn(self.parts):
            columns = [part.columns(batch) for batch in batches]
            unrolled = self._unroll(part, columns, weight)
            losses.append(unrolled.meta_loss.detach())
            lost.append(self._lost(columns, unrolled.aux))
            self._keep(part, unrolled)
        return torch.stack(losses).sum(), torch.cat(lost)

    # ---- as a CUDA graph ----

    def _new_captured(self) -> Captured | None:
        """Where all that a step changes stays where it is: forward mode, all rows here at once."""
        one = are_one_piece(self.parts)
        if not (self.model.fits_a_graph and one and self.config.mode == "forward"):
            return None
        gc.collect()  # graphs of an earlier training go now, not while others are captured
        return Captured(self._in_place, PATIENCE)

    def _read_at_once(
        self, batches: Sequence[SegmentBatch], weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `_read_by_parts`, by the captured step, whose losses all count alike."""
        assert self._captured is not None
        loss, lost, *after = self._captured(*chain.from_iterable(batches), *tensors(self.state))
        self.state = replace(self.state, after)
        share = weight * self.config.rows * self.config.unroll
        for parameter in self._learned():
            if parameter.grad is not None:
                parameter.grad *= share
        return loss * share, lost

    def _in_place(self, *taken: Tensor) -> tuple[Tensor, ...]:
        """Reads, leaving gradients, fast weights and traces where they are.

        A rule that has a forward mode has no state that changes.
        """
        config = self.config
        clear_gradients(self._learned())
        width = len(SegmentBatch._fields)
        starts = range(0, width * config.unroll, width)
        batches = [SegmentBatch(*taken[start : start + width]) for start in starts]
        self.state = replace(self.state, list(taken[width * config.unroll :]))
        unrolled = self._unroll(self.share, batches, 1.0 / (config.rows * config.unroll))
        lost = self._lost(batches, unrolled.aux)
        return unrolled.meta_loss.detach(), lost, *tensors(unrolled.state)

    # ---- what both do ----

    def _unroll(self, part: RowShare, batches: Sequence[SegmentBatch], weight: float) -> Unrolled:
        """Reads these rows, each of whose losses counts so much, and takes the gradient."""
        config, own = self.config, self.share
        self.model.share = part.unless_whole()
        unrolled = unroll(
            self._loss,
            self.rule,
            self.slow,
            self.rest,
            batches,
            part.within(own, self.state),
            fast=part.within(own, self.fast),
            truncate=True,
            order=config.order,
            mode=config.mode,
            traces=part.within(own, self.traces),
            overwrite=config.mode == "forward",
            rule_state=part.within(own, self.rule_state),
            weights=[weight] * len(batches),
            segment=config.checkpoint_every or None,
            apart=config.surprise > 0.0,
        ).cut()
        if unrolled.meta_loss.requires_grad:  # not where nothing learned precedes a loss
            unrolled.meta_loss.backward()
        return unrolled

    def _keep(self, part: RowShare, unrolled: Unrolled) -> None:
        """Takes over what these rows have learnt and where they stand."""
        found = unrolled.fast, unrolled.state, unrolled.rule_state, unrolled.traces
        if part == self.share:
            self.fast, self.state, self.rule_state, self.traces = found
        else:  # one part of several
            own = self.fast, self.state, self.rule_state, self.traces
            write(part.within(self.share, own), found)

    def _learned(self) -> list[torch.nn.Parameter]:
        model = [] if self.model_optimizer is None else list(self.model.parameters())
        return [*self.rule.parameters(), *model]

    def _loss(self, parameters: Parameters, batch: SegmentBatch, state: State) -> Any:
        with reduced_products(self.model.embedding.weight.device, self.config.bfloat16):
            return self.loss(parameters, batch, state)

    def _begin_articles(self) -> None:
        entered = self.share.places(self.passes.rows.enter())
        if not entered:
            return
        with torch.no_grad():
            self._begin(entered)

    def _begin(self, rows: Sequence[int]) -> None:
        """Puts W_0 and fresh states into these rows, in place."""
        set_rows(self.fast, rows, {name: self.slow[name] for name in self.fast})
        set_rows(self.state, rows, start_of(self.state))
        if self.rule_state is not None:
            initial = self.rule.initial_state(select_rows(self.fast, rows[:1]))
            set_rows(self.rule_state, rows, select_first(initial))
        if self.traces is not None:
            set_rows(self.traces, rows, dict.fromkeys(self.traces, 0.0))

    def _optimise(self, index: int) -> dict[str, float]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self.schedule(index)
        norms = {"rule_gradient_norm": clip_grad_norm_(self.rule.parameters(), config.clip)}
        if self.model_optimizer is not None:
            assert isinstance(config, JointTrainingConfig)
            model_norm = clip_grad_norm_(self.model.parameters(), config.model_clip)
            norms["model_gradient_norm"] = model_norm
        if not all(bool(norm.isfinite()) for norm in norms.values()):
            return {"skipped": 1.0}  # a row blew up on the way: it falls back, nobody learns
        self.optimizer.step()
        values = {"skipped": 0.0} | {name: float(norm) for name, norm in norms.items()}
        if self.model_optimizer is None or self.model_schedule is None:
            return values
        for group in self.model_optimizer.param_groups:
            group["lr"] = self.model_schedule(index)
        before = {name: weight.detach().clone() for name, weight in self.slow.items()}
        self.model_optimizer.step()
        with torch.no_grad():  # what a row has learnt is its displacement: it moves along with W_0
            for name, weight in self.slow.items():
                self.fast[name] += weight - before[name]
        return values

    def _lost(self, batches: Sequence[SegmentBatch], scores: Sequence[SegmentScore]) -> Tensor:
        """Which rows had a segment far worse than a uniform guess, bool [rows]."""
        size = self.model.config.vocabulary_size
        found = [
            lost_rows(score, batch, size) for score, batch in zip(scores, batches, strict=True)
        ]
        return torch.stack(found).any(0)

    @torch.no_grad()
    def _fall_back(self, lost: Tensor) -> int:
        """Puts rows that blew up back to W_0 and fresh states; says how many.

        As in reading, what counts are fast weights (or traces) that are not finite, and a segment
        far worse than a uniform guess: weights so large can still be finite, and as long as they
        stay nobody learns.

        Args:
            lost: the rows with such a segment.
        """
        for tensor in [*self.fast.values(), *(self.traces or {}).values()]:
            lost |= ~tensor.flatten(1).sum(1).isfinite()
        rows = lost.nonzero().flatten().tolist()
        if rows:
            self._begin(rows)
        return len(rows)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Model, rule, optimisers, and where every row stands, its fast weights included."""
        tree: dict[str, Any] = {
            "model": self.model.state_dict(),
            "rule": self.rule.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fast": whole(self.fast, self.config.rows),
            "state": whole(self.state, self.config.rows),
            "rule_state": whole(self.rule_state, self.config.rows),
            "traces": whole(self.traces, self.config.rows),
            "passes": self.passes.state_dict(),
        }
        if self.model_optimizer is not None:
            tree["model_optimizer"] = self.model_optimizer.state_dict()
        return pack(tree)

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        tree: Mapping[str, Any] = unpack(tensors, meta)
        device = self.model.embedding.weight.device
        self.model.load_state_dict(tree["model"])
        self.rule.load_state_dict(tree["rule"])
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.model_optimizer is not None:
            self.model_optimizer.load_state_dict(tree["model_optimizer"])
        fast = {name: tree["fast"][name] for name in self.slow}
        of_rows = fast, tree["state"], tree["rule_state"], tree.get("traces")
        self.fast, state, self.rule_state, self.traces = transform(
            self.share.of(of_rows), lambda part: part.to(device)
        )
        self.state = tuple(LayerState(*layer) for layer in state)
        self._captured = self._new_captured()  # the memory is another now
        self.passes.load_state_dict(tree["passes"])
