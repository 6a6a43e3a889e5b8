"""The diagonal Fisher information of a language model on training text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metalm.adapt.reading_state import checksum
from metalm.language.network.model import LanguageModel
from metalm.language.text.articles import ArticleSet
from metalm.language.text.streams import TokenStreams
from metalm.meta.gradient_statistics import GradientStatistics
from metalm.meta.parameters import Parameters
from metalm.training import checkpoint


def training_fisher(
    model: LanguageModel,
    articles: ArticleSet,
    names: Sequence[str],
    *,
    segment: int = 64,
    rows: int = 4,
    batches: int = 600,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Parameters:
    """F_i = mean over tokens x of E_{y ~ p(.|x)} [ (d log p(y|x) / d W_i)^2 ], without dropout.

    The labels are drawn from the model, as the definition has it (with the text's own labels it
    would be the "empirical" Fisher, which near a minimum of the loss can be far off: Kunstner,
    Balles, Hennig 2019). No gradient of a single token is needed: the text, not what was drawn,
    goes on into the hidden state, so that the scores of different tokens are uncorrelated and each
    has mean zero, and the square of their sum has the sum of the squares as its mean. A batch of N
    tokens gives (sum of scores)^2 / N.

    Each row is a random place of the text; `segment` tokens before it are read for the hidden state
    only, and the gradient ends there.

    Args:
        model: not changed.
        articles: training text.
        names: parameters that F is for.
        segment: tokens of each row in a batch.
        rows: places in a batch.
        batches: how many are averaged; the relative standard error is about sqrt(2 / batches).
        seed: of the places and of the labels.
        progress: told, after each batch, how many are done, and of how many.

    Returns:
        F of each parameter, in squared nats per token and squared unit of weight.

    Raises:
        ValueError: fewer tokens than two segments.
    """
    text = TokenStreams(articles, 1, seed, 0)
    if text.length < 2 * segment:
        raise ValueError(
            f"too little text for the Fisher information; expected at least {2 * segment} tokens, "
            f"found {text.length}; use shorter segments or more text"
        )
    random = np.random.default_rng([seed, text.length])
    places = random.integers(segment, text.length - segment, (batches, rows), endpoint=True)
    device = model.embedding.weight.device
    labels = torch.Generator(device).manual_seed(seed)
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name] for name in names}
    required = {name: weight.requires_grad for name, weight in wanted.items()}
    statistics = GradientStatistics()
    was_training = model.training
    model.eval()
    try:
        for weight in wanted.values():
            weight.requires_grad_(True)
        for number, batch in enumerate(places.tolist()):
            before, inputs = (
                torch.cat([text.segment(at, segment)[0] for at in starts], 1).to(device)
                for starts in ([place - segment for place in batch], batch)
            )
            with torch.no_grad():
                state = model(before, model.initial_state(rows)).state
            prediction = model(inputs, state).prediction
            with torch.no_grad():
                chances = prediction.logits.flatten(0, 1).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=labels).view_as(inputs)
            scaled = prediction.nats(drawn).sum() / math.sqrt(drawn.numel())
            gradients = torch.autograd.grad(scaled, list(wanted.values()))
            statistics.add(dict(zip(wanted, gradients, strict=True)))
            if progress is not None:
                progress(number + 1, batches)
    finally:
        model.train(was_training)
        for name, weight in wanted.items():
            weight.requires_grad_(required[name])
    return {name: rms.square_() for name, rms in statistics.rms().items()}


def kept_fisher(
    model: LanguageModel,
    articles: ArticleSet,
    names: Sequence[str],
    path: Path,
    *,
    batches: int = 600,
    progress: Callable[[int, int], None] | None = None,
) -> Parameters:
    """`training_fisher`, kept in a file: estimated anew only for other weights or another number.

    Args:
        model: not changed.
        articles: training text, which must be the same at every call.
        names: parameters that F is for.
        path: the file.
        batches: how many are averaged.
        progress: as `training_fisher` takes it; not told anything where the file serves.

    Raises:
        ValueError: too little text, or a file that is damaged or cannot be written.
    """
    identity = {"model": checksum(model), "batches": batches}
    if path.exists():
        found, meta = checkpoint.load(path)
        if meta == identity and found.keys() >= set(names):
            device = next(model.parameters()).device
            return {name: found[name].to(device) for name in names}
    fisher = training_fisher(model, articles, names, batches=batches, progress=progress)
    checkpoint.save(path, fisher, identity)
    return fisher


def spread(
    fisher: Mapping[str, Tensor], levels: Sequence[float] = (0.01, 0.1, 0.5, 0.9, 0.99)
) -> dict[str, list[float]]:
    """Quantiles of F over its mean: of all coordinates as "all", and tensor by tensor.

    Args:
        fisher: F of each parameter.
        levels: of the quantiles.

    Returns:
        [levels] by name, to three significant figures.
    """
    mean = sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    parts = {name: f.flatten().cpu().numpy() for name, f in fisher.items()}
    parts = {"all": np.concatenate(list(parts.values())), **parts}
    return {n: [float(f"{q / mean:.3g}") for q in np.quantile(p, levels)] for n, p in parts.items()}
