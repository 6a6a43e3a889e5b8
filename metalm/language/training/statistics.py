"""What is counted on the training text: token frequencies and the RMS of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metalm.language.network.model import LanguageModel, detach_state
from metalm.language.text.articles import ArticleSet
from metalm.language.text.streams import TokenStreams
from metalm.meta.gradient_statistics import GradientStatistics
from metalm.meta.parameters import Parameters


def token_counts(articles: ArticleSet, vocabulary_size: int) -> Tensor:
    """How often each token stands in the text: float32 [vocabulary]."""
    counts = torch.zeros(vocabulary_size)
    for article in articles:
        tokens = torch.from_numpy(article.tokens.astype("int64"))
        counts += torch.bincount(tokens, minlength=vocabulary_size)
    return counts


def gradient_rms(
    model: LanguageModel,
    articles: ArticleSet,
    names: Sequence[str],
    segment: int,
    *,
    rows: int = 100,
    batches: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Parameters:
    """RMS over batches of the gradient of a batch's mean token loss, without dropout.

    As Krause et al. have it: `rows` parallel streams of training text, segments as long as in
    reading, hidden states carried. They go through the whole training set; `batches` of them,
    spread over it, estimate the same mean.

    Args:
        model: not changed.
        articles: training text.
        names: parameters that the statistics are for.
        segment: tokens of each row in a batch.
        rows: parallel streams; fewer if there is little text.
        batches: how many are counted.
        seed: of the order of the articles.
        progress: told, after each batch, how many have been counted and how many will be.

    Returns:
        RMS of each parameter, in nats per token and unit of weight.
    """
    rows = max(1, min(rows, articles.num_tokens // (4 * segment)))
    streams = TokenStreams(articles, rows, seed, 0)
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name] for name in names}
    required = {name: weight.requires_grad for name, weight in wanted.items()}
    statistics = GradientStatistics()
    state = model.initial_state(rows)
    starts = range(0, streams.length - 1, segment)
    stride = max(1, len(starts) // batches)
    try:
        for weight in wanted.values():
            weight.requires_grad_(True)
        for number, start in enumerate(starts):
            counted = number % stride == 0
            if not counted and number % stride != stride - 1:
                continue  # only the segment before a counted one is read, for its hidden state
            inputs, targets = (part.to(device) for part in streams.segment(start, segment))
            with torch.set_grad_enabled(counted):
                output = model(inputs, state)
                if counted:
                    loss = output.prediction.nats(targets).mean()
                    gradients = torch.autograd.grad(loss, list(wanted.values()))
                    statistics.add(dict(zip(wanted, gradients, strict=True)))
                    if progress is not None:
                        progress(number // stride + 1, len(starts[::stride]))
            state = detach_state(output.state)
    finally:
        model.train(was_training)
        for name, weight in wanted.items():
            weight.requires_grad_(required[name])
    return statistics.rms()
