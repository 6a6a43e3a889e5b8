"""The Fisher information against explicit gradients of every token and every label."""

import numpy as np
import pytest
import torch

from metalm.language.memory import fisher as fisher_module
from metalm.language.memory.fisher import kept_fisher, spread, training_fisher
from metalm.language.text.streams import TokenStreams

NAMES = ("embedding.weight", "layers.1.input_weight", "decoder.bias")
SEGMENT, SEED = 2, 3


@pytest.fixture
def articles(article_set):
    random = np.random.default_rng(6)
    return article_set([random.integers(0, 11, length).astype(np.int32) for length in (4, 3)])


def scores(model, inputs, state, plain_forward):
    """For every token: the probability of every label, and the gradient of its logarithm."""
    leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    logits, _, _ = plain_forward(leaves, inputs, state)
    found = []
    for token in logits.log_softmax(-1):
        gradients = [
            torch.autograd.grad(label, [leaves[n] for n in NAMES], retain_graph=True)
            for label in token
        ]
        found.append((token.detach().exp(), gradients))
    return found


def exact(model, articles, plain_forward, plain_state):
    """The mean over all places that may be drawn, by the definition."""
    text = TokenStreams(articles, 1, SEED, 0)
    total = [torch.zeros_like(dict(model.named_parameters())[name]) for name in NAMES]
    starts = range(SEGMENT, text.length - SEGMENT + 1)
    for start in starts:
        before, inputs = (text.segment(at, SEGMENT)[0][:, 0] for at in (start - SEGMENT, start))
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        _, _, state = plain_forward(weights, before, plain_state(model))
        for chances, gradients in scores(model, inputs, state, plain_forward):
            for chance, of_label in zip(chances, gradients, strict=True):
                for sums, gradient in zip(total, of_label, strict=True):
                    sums += chance * gradient**2
    count = len(starts) * SEGMENT
    return {name: sums.detach() / count for name, sums in zip(NAMES, total, strict=True)}


def test_the_square_of_the_sum_has_the_sum_of_the_squares_as_its_mean(
    tiny_model, plain_forward, plain_state
):
    """Over all 121 pairs of labels of two tokens: what makes one backward pass a batch enough."""
    model = tiny_model()
    first, second = scores(model, [4, 9], plain_state(model), plain_forward)
    for place in range(len(NAMES)):
        of_sum, of_each = 0.0, 0.0
        for p, g in zip(*first, strict=True):
            for q, h in zip(*second, strict=True):
                of_sum = of_sum + p * q * (g[place] + h[place]) ** 2
                of_each = of_each + p * q * (g[place] ** 2 + h[place] ** 2)
        torch.testing.assert_close(of_sum, of_each, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cutoffs", [(), (4, 7)])
def test_the_estimate_comes_to_the_definition(tiny_model, articles, plain_forward, plain_state):
    """At the rate that its standard error says: 900 batches of a text with four places."""
    model = tiny_model(input_dropout=0.5)
    expected = exact(model, articles, plain_forward, plain_state)
    found = training_fisher(
        model.train(), articles, NAMES, segment=SEGMENT, rows=2, batches=900, seed=SEED
    )
    assert model.training
    assert list(found) == list(NAMES)
    for name in NAMES:
        assert found[name].sum().item() == pytest.approx(expected[name].sum().item(), rel=0.1)
        mean = expected[name].mean()
        # A squared sum that is nearly normal has 2 F^2 as its variance; a few labels are rare.
        allowed = 6 * expected[name] * (2 / 900) ** 0.5 + 0.1 * mean
        assert ((found[name] - expected[name]).abs() < allowed).all()
    assert (found["embedding.weight"] > 0).any()


def test_the_same_seed_gives_the_same_and_another_another(tiny_model, articles):
    model = tiny_model().requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    told = []
    one, two, other = (
        training_fisher(
            model,
            articles,
            NAMES,
            segment=SEGMENT,
            batches=3,
            seed=seed,
            progress=lambda *now: told.append(now),
        )
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in NAMES)
    assert not torch.equal(one["decoder.bias"], other["decoder.bias"])
    assert told == [(1, 3), (2, 3), (3, 3)] * 3
    assert not any(weight.requires_grad for weight in model.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_too_little_text_is_refused(tiny_model, articles):
    with pytest.raises(ValueError, match="expected at least 8 tokens, found 7"):
        training_fisher(tiny_model(), articles, NAMES, segment=4)


def test_what_is_kept_serves_the_same_weights_and_number_only(
    tiny_model, articles, tmp_path, monkeypatch
):
    path, counted = tmp_path / "fisher.safetensors", []

    def estimate(model, articles, names, *, batches, progress):
        counted.append(batches)
        return training_fisher(model, articles, names, segment=SEGMENT, batches=batches)

    monkeypatch.setattr(fisher_module, "training_fisher", estimate)
    asked = (tiny_model(), articles, NAMES, path)
    first = kept_fisher(*asked, batches=2)
    again = kept_fisher(*asked[:2], NAMES[:2], path, batches=2)
    assert counted == [2]
    assert list(again) == list(NAMES[:2])
    expected = training_fisher(tiny_model(), articles, NAMES, segment=SEGMENT, batches=2)
    for name in NAMES:
        assert torch.equal(first[name], expected[name])
        assert name not in again or torch.equal(again[name], expected[name])
    kept_fisher(*asked, batches=3)
    kept_fisher(tiny_model(seed=1), *asked[1:], batches=3)
    kept_fisher(tiny_model(seed=1), articles, [*NAMES, "layers.0.input_bias"], path, batches=3)
    assert counted == [2, 3, 3, 3]


def test_spread_is_in_units_of_the_mean_of_all_coordinates():
    found = spread({"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([8.0])}, (0.0, 0.5, 1.0))
    assert found == {"all": [0.25, 0.75, 2.0], "a": [0.25, 0.5, 0.75], "b": [2.0, 2.0, 2.0]}
