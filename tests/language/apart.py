"""Tiny trainings and readings, built alike here and in processes that share their rows and texts.

As a program, in each of several processes: takes trainings from their start and from what one
process saved in the middle, reads texts in both modes, and leaves what became of all that.

    apart.py FOLDER KIND ...
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.reading.copy_readings import Request, read_copies
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.reader import CacheGrid
from metalm.language.reading.store import ReadingStore
from metalm.language.text.articles import SCHEMA, ArticleSet
from metalm.language.training.awd_training import AwdTraining, AwdTrainingConfig
from metalm.language.training.base_training import BaseTraining, BaseTrainingConfig
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import JointTrainingConfig, RuleTrainingConfig
from metalm.meta.parameters import choose
from metalm.meta.rules.gated import Gated
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.training import checkpoint
from metalm.training.processes import together
from metalm.training.state import pack, random_states, restore_random_states, unpack

FOUND = Path(__file__)
STEPS, MIDDLE, SEED, ROWS = 6, 3, 6, 5
LENGTHS = (9, 14, 3, 7, 12, 1, 5)
DROPOUT = {
    "input_dropout": 0.2,
    "hidden_dropout": 0.3,
    "output_dropout": 0.1,
    "embedding_dropout": 0.2,
    "weight_dropout": 0.1,
}
BASE = BaseTrainingConfig(
    rows=ROWS, window=4, learning_rate=0.05, weight_decay=0.1, clip=0.3, bfloat16=False
)
SIZES = {"rows": ROWS, "segment": 3, "unroll": 2, "learning_rate": 0.03, "clip": 0.05}
JOINT = JointTrainingConfig(model_clip=0.2, **SIZES)
MODES = ("reset", "carry")
SGD = {"rate": 0.4, "decay": 0.05}
RMS = {"rate": 0.1, "decay": 0.05, "eps": 0.5}
ASTRAY = {"rate": 1e200, "decay": 0.0}
AWD = AwdTrainingConfig(
    recipe="nt-asgd",
    epochs=3,
    rows=ROWS,
    window=4,
    window_spread=1.0,
    shortest_window=2,
    learning_rate=2.0,
    validation_rows=2,
    non_monotone=1,
    clip=0.1,
    bfloat16="off",
)
# Of each training: its configuration, whether the rule is gated, and into how many parts a process
# cuts its rows.
KINDS = {
    "base": (BASE, False, 1),
    "base in parts": (BASE, False, 2),
    "nt-asgd": (AWD, False, 1),
    "one-cycle, in parts": (
        dataclasses.replace(AWD, recipe="one-cycle", learning_rate=0.02),
        False,
        2,
    ),
    "rule": (RuleTrainingConfig(**SIZES), False, 1),
    "gated rule": (RuleTrainingConfig(**SIZES), True, 1),
    "joint": (JOINT, False, 1),
    "joint, gated, in parts": (JOINT, True, 2),
    "joint, checkpoints": (
        dataclasses.replace(JOINT, unroll=5, checkpoint_every=2),
        False,
        1,
    ),
    "joint, forward, in parts": (dataclasses.replace(JOINT, mode="forward"), False, 2),
    "joint, second order": (dataclasses.replace(JOINT, order=2), False, 1),
    "joint, a row blows up": (JOINT, False, 2),
}


def schedule(index):
    return 1.0 / (1 + 0.5 * index)


def articles():
    random = np.random.default_rng(3)
    rows = [
        {
            "title": f"article {number}",
            "text": " ".join("w" * length),
            "tokens": random.integers(0, 11, length).tolist(),
            "words": list(range(length)),
            "num_words": length,
        }
        for number, length in enumerate(LENGTHS)
    ]
    return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))


def build(kind, parts=None):
    """A training before its first step; the same numbers wherever it is built."""
    config, gated, own_parts = KINDS[kind]
    parts = own_parts if parts is None else parts
    torch.manual_seed(SEED)
    sizes = {"vocabulary_size": 11, "embedding_size": 3, "hidden_size": 5, "num_layers": 2}
    model = LanguageModel(ModelConfig(**sizes | DROPOUT)).double()
    if isinstance(config, BaseTrainingConfig):
        return BaseTraining(model, articles(), config, schedule, SEED, accumulation=parts)
    if isinstance(config, AwdTrainingConfig):
        return AwdTraining(model, articles(), articles(), config, SEED, parts)
    names = choose(model, ("embedding.*", "layers.1.input_weight", "*_bias"))
    generator = torch.Generator().manual_seed(2)
    rms = {
        name: torch.rand(weight.shape, generator=generator, dtype=weight.dtype) * 0.3 + 0.01
        for name, weight in model.named_parameters()
        if name in names
    }
    rule = LearnedRates(rms, "row", rate=0.3, decay=0.02, exponent=0.4, eps=0.8)
    rule = Gated(rule, hidden=2) if gated else rule
    joint = isinstance(config, JointTrainingConfig)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    return MetaTraining(
        model,
        rule,
        names,
        articles(),
        config,
        schedule,
        SEED,
        optimizer if joint else None,
        (lambda index: 0.02 * schedule(index)) if joint else None,
        parts,
    )


def go(training, kind, steps):
    """Takes these steps; what they said."""
    values = []
    for index in steps:
        if kind == "joint, a row blows up" and index == MIDDLE:
            strike(training)
        values.append(dict(training.step(index)))
    return values


def strike(training):
    """Makes the fast weights of the row that has most to read useless, in whatever process."""
    left = [len(articles()[a].tokens) - at for a, at in training.passes.rows.positions]
    (place,) = training.share.places([left.index(max(left))]) or [None]
    for weight in training.fast.values():
        if place is not None:
            weight[place] *= 1e200


def keep(path, training, values=()):
    """Saves where a training stands, with the random states, as the loop does."""
    tensors, meta = training.state_dict()
    random, random_meta = pack(random_states())
    random = {f"random.{name}": tensor for name, tensor in random.items()}
    meta = {"state": meta, "random": random_meta, "values": list(values)}
    checkpoint.save(path, tensors | random, meta)


def resume(path, kind, parts=None):
    """The training that was kept there."""
    tensors, meta = checkpoint.load(path)
    training = build(kind, parts)
    training.load_state_dict(tensors, meta["state"])
    random = {n.removeprefix("random."): t for n, t in tensors.items() if n.startswith("random.")}
    restore_random_states(unpack(random, meta["random"]))
    return training


def read(folder, mode):
    """Reads texts with several methods and keeps what that gave, by the place of the method."""
    store = ReadingStore(folder / mode)
    requests, texts = REQUESTS, texts_of(mode)
    for places, several in read_copies(models(), requests, texts, 2, confidence=True, curves=True):
        for place, readings in zip(places, several, strict=True):
            store.put({"method": place}, readings)


def texts_of(mode):
    texts = [article.tokens for article in articles()]
    return texts if mode == "reset" else [np.concatenate(texts)]


GRID = CacheGrid(thetas=(0.4, 1.1), window=6)
METHODS = (
    Method(name="static", model="control", learning="none", segment=7),
    Method(name="sgd", model="control", learning="sgd", segment=4, settings=SGD),
    Method(name="rms", model="control", learning="rms", segment=4, settings=RMS),
    Method(name="metalm", model="joint", learning="joint", segment=4),
    Method(name="gone astray", model="control", learning="sgd", segment=4, settings=ASTRAY),
)
REQUESTS = [Request(method, GRID if method.segment == 4 else None) for method in METHODS]


def models():
    """A control, and a joint model with its rule, both untrained."""
    control, joint = (build(kind).model.eval() for kind in ("base", "joint"))
    rule = build("joint").rule
    names = tuple(name for name, _ in control.named_parameters())
    generator = torch.Generator().manual_seed(2)
    rms = {
        name: torch.rand(weight.shape, generator=generator, dtype=weight.dtype) + 0.1
        for name, weight in control.named_parameters()
    }
    return TrainedModels(
        models={"control": control, "joint": joint},
        rules={"joint": rule.requires_grad_(False)},
        rival_names=names,
        statistics={4: rms},
    )


def main(folder, kinds):
    for mode in MODES:
        read(folder, mode)
    for kind in kinds:
        training = build(kind)
        values = go(training, kind, range(MIDDLE))
        keep(folder / f"{kind} in the middle", training)
        values += go(training, kind, range(MIDDLE, STEPS))
        keep(folder / f"{kind} at the end", training, values)
        for start in ("in the middle", "in the middle, by one"):
            training = resume(folder / f"{kind} {start}", kind)
            values = go(training, kind, range(MIDDLE, STEPS))
            keep(folder / f"{kind} {start}, then at the end", training, values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with together():
        main(Path(sys.argv[1]), sys.argv[2:])
