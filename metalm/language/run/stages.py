"""The trainings of an experiment: each leaves one file and can be resumed.

    base      ordinary training on the articles that are not held out
    control   goes on from the base with ordinary training on all articles: what the rivals run on
    rule      the update rule, on the held-out articles, the base frozen
    joint     rule and W_0 together, with reading in the loop, on all articles: metalm

`control` and `joint` read as many tokens under the same learning-rate schedule, so that the
comparison between them is a comparison of methods. That schedule is the rest of the base's; where
the base was trained by a published recipe, whose schedule has ended, it is one of their own, with a
fresh optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metalm.language.network.model import LanguageModel
from metalm.language.reading.article_starts import refuse_no_starts
from metalm.language.run.presets import ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.trained import count_gradients, load_model, load_rule
from metalm.language.text.articles import ArticleSet, Corpus
from metalm.language.text.row_share import own_parts
from metalm.language.training.awd_training import AwdTraining, start_as_published
from metalm.language.training.base_training import BaseTraining, one_cycle
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import (
    MetaTrainingConfig,
    refuse_impossible,
    starting_rule,
)
from metalm.language.training.statistics import token_counts
from metalm.meta.parameters import choose
from metalm.meta.rules.kinds import LearnedRule
from metalm.training.loop import run
from metalm.training.processes import is_first
from metalm.training.record import Record
from metalm.training.state import pack, unpack

# Each stage, and the stages that it goes on from.
_BEFORE = {"base": (), "control": ("base",), "rule": ("base",), "joint": ("base", "rule")}
STAGES = tuple(_BEFORE)

RULE_CYCLE = 0.05, 0.05
"""Share of a rule's training in which its rate rises, and that at the end, of the highest; a guess
that was never searched."""


def refuse_unknown(names: Sequence[str]) -> None:
    """Checks the names of stages.

    Raises:
        ValueError: one is not among `STAGES`; the message lists them.
    """
    for name in names:
        if name not in STAGES:
            raise ValueError(
                f"unknown stage; expected some of {', '.join(STAGES)}, found {name!r}; correct "
                f"--stages"
            )


class Stages:
    """The trainings of one run.

    Args:
        config: the experiment.
        corpus: its text.
        folder: where weights, checkpoints and metrics go.
    """

    def __init__(self, config: ExperimentConfig, corpus: Corpus, folder: LanguageRunFolder) -> None:
        self.config, self.corpus, self.folder = config, corpus, folder
        train, held_out = hold_out(len(corpus.train), config.data.held_out, config.seed)
        self.base_articles: ArticleSet = corpus.train.select(train)
        self.held_out_articles: ArticleSet = corpus.train.select(held_out)

    def refuse_unready(self, names: Sequence[str]) -> None:
        """Checks that these stages can run one after the other, before the first of them does.

        Raises:
            ValueError: an unknown stage, one whose predecessor neither has finished nor comes
                before it, a joint training that has no such rule, rows that cannot be shared or
                read in parts, or too few articles to learn where they begin.
        """
        refuse_unknown(names)
        for name in names:
            own_parts(self._rows(name), self.config.accumulation)
        if self.config.tuning.flush and not self.folder.has("article-starts"):
            refuse_no_starts(self.base_articles, self.config.seed)
        if "joint" in names:
            refuse_impossible(self.config.rule, self.config.joint.mode)
        for place, name in enumerate(names):
            for before in _BEFORE[name]:
                if before not in names[:place] and not self.folder.has(name):
                    self.folder.load(before)  # says what is missing

    def _rows(self, name: str) -> int:
        """Rows of a batch of a stage."""
        config = self.config
        published = name == "base" and self._published
        section = {"rule": config.rule, "joint": config.joint}.get(name, config.base)
        return config.awd.rows if published else section.rows

    def train(self, name: str) -> None:
        """Runs one stage to its end, from its newest checkpoint if there is one.

        Raises:
            ValueError: an unknown stage, or one whose predecessor has not finished.
        """
        self.refuse_unready([name])
        if self.folder.has(name):
            return
        torch.manual_seed(self.config.seed * len(STAGES) + STAGES.index(name))
        getattr(self, f"_{name}")()

    # ---- ordinary training ----

    @property
    def _published(self) -> bool:
        """Whether the base is trained by a published recipe."""
        return self.config.awd.recipe != "off"

    @property
    def _total_steps(self) -> tuple[int, int]:
        """Steps of base and control under their common schedule."""
        base = self.config.base
        own = 0 if self._published else base.steps(base.tokens)
        return own, base.steps(self.config.joint.tokens)

    def _schedule(self, done: int, step: int) -> float:
        """Share of the highest rate at a step of a training that begins after `done` steps."""
        base = self.config.base
        return one_cycle((done + step) / sum(self._total_steps), base.warm_up, base.final_rate)

    def _base(self) -> None:
        config = self.config
        if self._published:
            self._published_base()
            return
        model = LanguageModel(config.model)
        model.start_from_frequencies(token_counts(self.base_articles, config.model.vocabulary_size))
        model.to(config.device)
        training = BaseTraining(
            model,
            self.base_articles,
            config.base,
            lambda index: self._schedule(0, index),
            config.seed,
            accumulation=config.accumulation,
        )
        self._run("base", training, self._total_steps[0])
        self._save("base", model=model.state_dict(), optimizer=training.optimizer.state_dict())

    def _published_base(self) -> None:
        config = self.config
        if config.awd.start:
            before = LanguageRunFolder(Path(config.awd.start))
            model = load_model(before, "base", config).requires_grad_(True)
            before.refuse_other_vocabulary(self.corpus)
        else:
            model = start_as_published(LanguageModel(config.model)).to(config.device)
        training = AwdTraining(
            model,
            self.base_articles,
            self.corpus.valid,
            config.awd,
            config.seed,
            config.accumulation,
        )
        self._run("base", training, training.num_steps)
        self._save("base", model=training.finish().state_dict())

    def _control(self) -> None:
        config = self.config
        before = self._load("base")
        if config.joint.tokens == 0:
            self._save("control", model=before["model"])
            return
        model = self._model(before)
        base_steps, more = self._total_steps
        training = BaseTraining(
            model,
            self.corpus.train,
            config.base,
            lambda index: self._schedule(base_steps, index),
            config.seed + 1,
            before.get("optimizer"),
            config.accumulation,
        )
        self._run("control", training, more)
        self._save("control", model=model.state_dict())

    # ---- meta-training ----

    def _rule(self) -> None:
        config = self.config.rule
        model = self._model(self._load("base"))
        rule = self._new_rule(model)
        steps = _meta_steps(config)
        training = MetaTraining(
            model,
            rule,
            rule.names,
            self.held_out_articles,
            config,
            lambda index: one_cycle(index / steps, *RULE_CYCLE),
            self.config.seed,
            accumulation=self.config.accumulation,
        )
        self._run("rule", training, steps)
        self._save("rule", rule=rule.state_dict())

    def _joint(self) -> None:
        config = self.config.joint
        before = self._load("base")
        if config.tokens == 0:
            self._save("joint", model=before["model"], rule=self._load("rule")["rule"])
            return
        model = self._model(before)
        names = choose(model, self.config.rule.adapt)
        rule = load_rule(self.folder, "rule", self.config, names).requires_grad_(True)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.model_learning_rate,
            betas=(0.9, self.config.base.beta2),
            weight_decay=self.config.base.weight_decay,
        )
        if "optimizer" in before:
            optimizer.load_state_dict(before["optimizer"])
        steps = _meta_steps(config)
        base_steps, more = self._total_steps
        training = MetaTraining(
            model,
            rule,
            rule.names,
            self.corpus.train,
            config,
            lambda index: one_cycle(index / steps, *RULE_CYCLE),
            self.config.seed + 1,
            optimizer,
            lambda index: (
                config.model_learning_rate * self._schedule(base_steps, round(index * more / steps))
            ),
            self.config.accumulation,
        )
        self._run("joint", training, steps)
        self._save("joint", model=model.state_dict(), rule=rule.state_dict())

    def _new_rule(self, model: LanguageModel) -> LearnedRule:
        """The rule before training, with statistics of the base's training articles."""
        config = self.config.rule
        names = choose(model, config.adapt)
        rms = count_gradients(self.config, model, self.base_articles, names, config.segment)
        return starting_rule(rms, config, self.config.seed)

    # ---- shared ----

    def _model(self, tree: dict[str, Any]) -> LanguageModel:
        model = LanguageModel(self.config.model)
        model.load_state_dict(tree["model"])
        return model.to(self.config.device)

    def _run(self, name: str, training: Any, steps: int) -> None:
        stage = self.folder.stage(name)
        with Record(stage) if is_first() else nullcontext() as record:
            run(
                training,
                num_steps=steps,
                folder=stage,
                record=record,
                save_every_seconds=120.0,
                log_every=20,
                configuration=self._relevant(name),
                title=name,
            )

    def _relevant(self, name: str) -> dict[str, Any]:
        """The part of the configuration that a stage's numbers depend on."""
        config = self.config
        parts: dict[str, Any] = {"model": config.model, "base": config.base}
        if self._published:
            parts["awd"] = config.awd
        if name in ("rule", "joint"):
            parts["rule"] = config.rule
        settings = {part: asdict(value) for part, value in parts.items()}
        if name == "joint":
            settings["joint"] = asdict(config.joint)
        return settings | {
            "seed": config.seed,
            "held_out": config.data.held_out,
            "joint_tokens": config.joint.tokens,
            "corpus": self.corpus.manifest["identity"],
        }

    def _save(self, name: str, **tree: Any) -> None:
        tensors, meta = pack(tree)
        self.folder.save(name, tensors, meta)

    def _load(self, name: str) -> dict[str, Any]:
        tree = unpack(*self.folder.load(name))
        return dict(tree)


def hold_out(count: int, share: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of the articles that the base reads, and of those kept for the rule; each in order.

    With a share of 0 both read all of them.

    Raises:
        ValueError: one of the two would be empty.
    """
    if share == 0.0:
        return range(count), range(count)
    kept = max(1, round(count * share))
    if count - kept < 1:
        raise ValueError(
            f"too few training articles; expected at least one beside the {kept} that are held out "
            f"(a share of {share:g}), found {count} in all; add articles, or lower data.held_out"
        )
    order = np.random.default_rng([seed, count]).permutation(count)
    return sorted(int(i) for i in order[kept:]), sorted(int(i) for i in order[:kept])


def _meta_steps(config: MetaTrainingConfig) -> int:
    return max(1, round(config.tokens / (config.rows * config.segment * config.unroll)))
