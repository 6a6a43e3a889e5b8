"""Adaptive input and softmax: against torch's own, plain formulas, and one model per row."""

import math
import re

import numpy as np
import pytest
import torch

from metalm.language.network import adaptive_softmax
from metalm.language.network.adaptive_softmax import (
    AdaptiveEmbedding,
    AdaptivePrediction,
    TailPrediction,
)
from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.network.segment_loss import SegmentLoss, confidence
from metalm.language.network.tied_embedding import Tables
from metalm.language.text.article_batches import SegmentBatch
from metalm.meta.parameters import call, choose, split

TIME, ROWS, SIZE, VOCABULARY = 7, 3, 6, 13
CUTOFFS = (4, 7)  # four tokens with vectors of 6 numbers, three of 3, six of 1


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def gradients(output, leaves, cotangent):
    return torch.autograd.grad(output, leaves, cotangent, allow_unused=True, materialize_grads=True)


@pytest.fixture
def cutoffs():
    return CUTOFFS


@pytest.fixture
def build(tiny_model):
    def model(seed=0, **changes):
        sizes = {"vocabulary_size": VOCABULARY, "embedding_size": SIZE, "hidden_size": 5}
        found = tiny_model(seed=seed, **sizes | changes)
        with torch.no_grad():
            for tail in found.embedding.tails:
                tail.weight.mul_(10)
        return found

    return model


@pytest.fixture(params=[1, 2, 4, 50])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(adaptive_softmax, "_CHUNK", request.param)


def tokens(seed=3):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (TIME, ROWS)))


TARGETS = {
    "mixed": tokens(5),
    "each row its own": torch.tensor([[3, 5, 9], [0, 6, 12], [1, 4, 7]]).repeat(3, 1)[:TIME],
    "head alone": tokens(5) % 4,
    "one tail alone": tokens(5) % 6 + 7,
}
targets_of_all_kinds = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)


def predict(model, values):
    """The model's prediction, from these values in the place of its last layer's."""
    embedding, tails = model.embedding, [*model.embedding.tails]
    tables = Tables(embedding.weight, [t.weight for t in tails], [t.projection for t in tails])
    return model.decoder.predict(values, tables)


def torchs_own(model):
    """torch.nn.AdaptiveLogSoftmaxWithLoss with the model's numbers; its tails have no biases."""
    own = torch.nn.AdaptiveLogSoftmaxWithLoss(
        SIZE, VOCABULARY, [*CUTOFFS], div_value=2.0, head_bias=True, dtype=torch.float64
    )
    bias = model.decoder.bias
    with torch.no_grad():
        bias[4:VOCABULARY] = 0.0
        own.head.weight.copy_(model.embedding.weight)
        own.head.bias.copy_(torch.cat((bias[:4], bias[VOCABULARY:])))
        for (down, up), tail in zip(own.tail, model.embedding.tails, strict=True):
            down.weight.copy_(tail.projection.t())
            up.weight.copy_(tail.weight)
    return own


@targets_of_all_kinds
@pytest.mark.parametrize("way", ["nats", "scores", "logits"])
@pytest.mark.usefixtures("_chunk")
def test_values_and_gradients_are_those_of_torch(build, targets, way):
    model = build()
    own = torchs_own(model)
    values, cotangent = draw(TIME, ROWS, SIZE).requires_grad_(), draw(TIME, ROWS, seed=1)
    prediction = predict(model, values)
    if way == "logits":
        found = -prediction.logits.gather(2, targets.unsqueeze(2)).squeeze(2)
    else:
        found = getattr(prediction, way)(targets)
    expected = -own(values.flatten(0, 1), targets.flatten()).output.view(TIME, ROWS)
    close(found, expected)
    close(prediction.logits.flatten(0, 1), own.log_prob(values.flatten(0, 1)))
    ours = [values, model.embedding.weight, model.decoder.bias]
    theirs = [values, own.head.weight, own.head.bias]
    for tail, (down, up) in zip(model.embedding.tails, own.tail, strict=True):
        ours += [tail.weight, tail.projection]
        theirs += [up.weight, down.weight]
    found = [*gradients(found, ours, cotangent)]
    found[2] = torch.cat((found[2][:4], found[2][VOCABULARY:]))
    expected = [*gradients(expected, theirs, cotangent)]
    expected[4::2] = [gradient.t() for gradient in expected[4::2]]
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@targets_of_all_kinds
@pytest.mark.parametrize("way", ["nats", "scores"])
@pytest.mark.usefixtures("_chunk")
def test_model_and_its_tied_gradients_equal_plain_autograd(
    build, plain_nats, plain_state, targets, way
):
    """Biases of tails included; vectors and projections are used at both ends."""
    model, inputs, cotangent = build(), tokens(), draw(TIME, ROWS, seed=1)
    output = model(inputs, model.initial_state(ROWS))
    found = getattr(output.prediction, way)(targets)
    found.backward(cotangent)
    leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    assert leaves["embedding.tails.0.weight"].shape == (3, 3)
    assert leaves["embedding.tails.1.projection"].shape == (6, 1)
    for row in range(ROWS):
        state = plain_state(model)
        nats, features, _ = plain_nats(leaves, inputs[:, row], targets[:, row], state)
        close(found[:, row], nats)
        close(output.features[:, row], features)
        nats.backward(cotangent[:, row])
    for name, weight in model.named_parameters():
        close(weight.grad, leaves[name].grad)


def test_probabilities_sum_to_one(build):
    model = build()
    logits = predict(model, 3 * draw(TIME, ROWS, SIZE)).logits
    assert logits.shape == (TIME, ROWS, VOCABULARY)
    close(logits.exp().sum(-1), torch.ones(TIME, ROWS, dtype=torch.float64))


@pytest.mark.parametrize(
    "patterns",
    [
        ("*",),
        ("embedding.*",),
        ("embedding.weight", "decoder.bias"),
        ("embedding.tails.0.projection", "embedding.tails.1.weight"),
        ("decoder.bias",),
        ("layers.*",),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["nats", "scores", "logits"])
def test_weights_per_row_equal_one_model_per_row(build, patterns, way):
    models, shared = [build(seed=row) for row in range(ROWS)], build(seed=7)
    names = choose(shared, patterns)
    fast = {
        name: torch.stack([m.get_parameter(name).detach() for m in models]).requires_grad_()
        for name in names
    }
    _, rest = split(shared, names)
    inputs, targets, cotangent = tokens(), TARGETS["mixed"], draw(TIME, ROWS, seed=1)

    def cost(output, targets):
        if way == "logits":
            return -output.logits.gather(2, targets.unsqueeze(2)).squeeze(2)
        return getattr(output.prediction, way)(targets)

    output = call(shared, {**rest, **fast}, inputs, shared.initial_state(ROWS))
    found = cost(output, targets)
    found.backward(cotangent)
    to_rest = {name: torch.zeros_like(weight) for name, weight in rest.items()}
    for row, own in enumerate(models):
        with torch.no_grad():
            for name, weight in rest.items():
                own.get_parameter(name).copy_(weight)
        part = slice(row, row + 1)
        expected = cost(own(inputs[:, part], own.initial_state(1)), targets[:, part])
        close(found[:, part], expected)
        expected.backward(cotangent[:, part])
        for name in names:
            close(fast[name].grad[row], own.get_parameter(name).grad)
        for name in rest:
            to_rest[name] += own.get_parameter(name).grad
    for name, gradient in to_rest.items():
        close(rest[name].grad, gradient)


@targets_of_all_kinds
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("way", ["nats", "scores"])
def test_second_derivative(targets, per_row, way, monkeypatch):
    monkeypatch.setattr(adaptive_softmax, "_CHUNK", 2)
    rows = (ROWS,) if per_row else ()
    names = ("head", "values", "weight", "bias", "values", "weight", "bias")
    shapes = ((TIME, ROWS, 6), (TIME, ROWS, 2), (*rows, 3, 2), (*rows, 3), (TIME, ROWS, 1))
    shapes = (*shapes, (*rows, 6, 1), (*rows, 6))
    assert len(names) == len(shapes)
    leaves = [draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]

    def nats(head, *parts):
        tails = [
            TailPrediction(range(4, 7), *parts[:3]),
            TailPrediction(range(7, VOCABULARY), *parts[3:]),
        ]
        return getattr(AdaptivePrediction(head, tails), way)(targets)

    assert torch.autograd.gradcheck(nats, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(nats, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_row", [False, True])
def test_no_bit_of_a_score_depends_on_later_tokens_or_other_rows(dtype, per_row):
    """At sizes where a product of fewer than four rows is known to round in another way."""
    time, size, rows = 20, 48, (ROWS,) if per_row else ()
    tails = [
        TailPrediction(
            tokens_of_tail,
            draw(time, ROWS, size, seed=n, dtype=dtype),
            draw(*rows, len(tokens_of_tail), size, seed=n + 2, dtype=dtype),
            draw(*rows, len(tokens_of_tail), seed=n + 4, dtype=dtype),
        )
        for n, tokens_of_tail in enumerate((range(50, 350), range(350, 1000)))
    ]
    prediction = AdaptivePrediction(draw(time, ROWS, 52, seed=9, dtype=dtype), tails)
    random = np.random.default_rng(8)
    # Two or three tokens of each tail in a row of twenty; then all that follows in a cluster.
    first = random.choice([0, 50, 350], (time, ROWS), p=[0.75, 0.125, 0.125])
    targets = torch.from_numpy(first + random.integers(0, 50, (time, ROWS)))
    before = prediction.scores(targets)
    for place in range(time):
        for cluster in (0, 50, 350):
            changed = targets.clone()
            changed[place:, 1] = torch.from_numpy(cluster + random.integers(0, 50, time - place))
            after = prediction.scores(changed)
            assert torch.equal(before[:place, 1], after[:place, 1])
            assert torch.equal(before[:, ::2], after[:, ::2])
    torch.testing.assert_close(before, -prediction.logits.gather(2, targets[..., None])[..., 0])


@pytest.mark.parametrize("way", ["nats", "scores"])
def test_a_tail_that_no_target_needs_is_not_computed(build, monkeypatch, way):
    model, sizes = build(), []

    def recording(values, weight, bias):
        sizes.append(weight.shape[-2])
        return row_linear(values, weight, bias)

    row_linear = adaptive_softmax.row_linear
    monkeypatch.setattr(adaptive_softmax, "row_linear", recording)
    for targets, expected in (("head alone", []), ("one tail alone", [6, 6]), ("mixed", [3, 3, 6])):
        prediction = predict(model, draw(TIME, ROWS, SIZE))
        sizes.clear()
        getattr(prediction, way)(TARGETS[targets])
        assert set(sizes) == set(expected), targets


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["head", "tail"])
def test_a_softmax_that_is_not_finite_says_nothing_whatever_the_target(build, bad, place):
    """The head's is then uniform over the vocabulary, a tail's over its tokens."""
    model, values = build(), draw(TIME, ROWS, SIZE)
    fine, broken = predict(model, values), predict(model, values)
    logs = fine.logits.clone()
    if place == "head":
        broken.head[2, 1, 4] = bad
        logs[2, 1] = -math.log(VOCABULARY)
    else:
        broken.tails[1].values[2, 1] = bad
        of_tail = logs[2, 1, 7:].exp().sum()
        logs[2, 1, 7:] = of_tail.log() - math.log(6)
    close(broken.logits, logs)
    for target in range(VOCABULARY):
        targets = TARGETS["mixed"].clone()
        targets[2, 1] = target
        close(broken.scores(targets), -logs.gather(2, targets[..., None])[..., 0])
    assert torch.isfinite(confidence(broken.logits)).all()


def test_confidence_is_that_of_the_whole_distribution(build):
    model = build()
    batch = SegmentBatch(tokens(), TARGETS["mixed"], torch.ones(TIME, ROWS))
    parameters, state = dict(model.named_parameters()), model.initial_state(ROWS)
    _, score, _ = SegmentLoss(model, TIME, confidence=True)(parameters, batch, state)
    logs = model(batch.inputs, state).logits
    close(score.confidence[0], logs.amax(-1))
    close(score.confidence[1], -(logs.exp() * logs).sum(-1))
    assert not score.confidence.requires_grad


def test_training_starts_at_the_unigram_entropy(build):
    """Where the features say nothing, the loss is the cross entropy of the smoothed unigrams."""
    counts = torch.tensor([50.0, 0, 3, 17, 1, 1, 8, 2, 9, 4, 1, 0, 1], dtype=torch.float64)
    model = build()
    model.start_from_frequencies(counts)
    smoothed = (counts + 1) / (counts + 1).sum()
    close(predict(model, torch.zeros(1, 1, SIZE, dtype=torch.float64)).logits[0, 0], smoothed.log())


def test_vectors_and_logits_of_tails_start_spread_like_those_of_the_head():
    """But for how the few numbers of a projection fall."""
    torch.manual_seed(2)
    embedding = AdaptiveEmbedding(3000, 32, (1000, 2000), 2)
    sizes = [tail.weight.shape[1] for tail in embedding.tails]
    assert sizes == [16, 8]
    vectors, tables = embedding.look_up(torch.arange(3000).unsqueeze(1))
    spreads = [part.square().mean().sqrt().item() for part in vectors.split(1000)]
    np.testing.assert_allclose(spreads, 0.1 / math.sqrt(3), rtol=0.1)
    values = draw(200, 1, 32, dtype=torch.float32)
    said = embedding.make_decoder().predict(values, tables)
    logits = [said.head[..., :1000]] + [t.values @ t.weight.t() for t in said.tails]
    expected = 0.1 / math.sqrt(3) * math.sqrt(32)
    np.testing.assert_allclose([part.std().item() for part in logits], expected, rtol=0.15)


def test_products_in_bfloat16_are_near(build):
    model = build().float()
    cotangent, found = draw(TIME, ROWS, seed=1, dtype=torch.float32), []
    for lower in (False, True):
        for way in ("nats", "scores"):
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                output = model(tokens(), model.initial_state(ROWS))
                nats = getattr(output.prediction, way)(TARGETS["mixed"])
            assert nats.dtype == torch.float32
            parts = torch.autograd.grad(nats, [*model.parameters()], cotangent)
            found.append(torch.cat([nats.flatten(), *(part.flatten() for part in parts)]))
    torch.testing.assert_close(found[0], found[1])
    for lower in found[2:]:
        assert not torch.equal(lower, found[0])
        assert torch.cosine_similarity(lower, found[0], dim=0) > 0.995


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoffs": (4, 4)}, "expected rising numbers from 1 on, found 4, 4; do sort them"),
        ({"cutoffs": (0, 4)}, "expected rising numbers from 1 on, found 0, 4"),
        ({"cutoffs": (4, 13)}, "expected cutoffs below the 13 tokens of the vocabulary, found 13"),
        ({"shrink": 0}, "model.shrink is too low; expected at least 1, found 0"),
    ],
)
def test_impossible_clusters_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LanguageModel(ModelConfig(vocabulary_size=VOCABULARY, **changes))
