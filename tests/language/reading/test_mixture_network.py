import math

import numpy as np
import pytest
import torch

from metalm.language.reading.copies import nats_of_copies, network_of_copies
from metalm.language.reading.mixing import mixture
from metalm.language.reading.mixture_network import (
    MixtureNetwork,
    fit_mixture_network,
    learned_mixture_nats,
    mixture_features,
)
from metalm.language.reading.reader import Readings

TOKENS, PRIOR = 40, [0.5, 0.3, 0.2]


@pytest.fixture
def said():
    found = np.random.default_rng(3).normal(-2, 1, (3, TOKENS))
    found[2, :4] = np.nan
    found[2, 7] = -np.inf
    return found


@pytest.fixture
def features():
    found = torch.randn(TOKENS, 5, generator=torch.Generator().manual_seed(4))
    found[:4, 2] = math.nan
    return found


@pytest.fixture
def network():
    torch.manual_seed(5)
    made = MixtureNetwork(5, 3, hidden=4)
    torch.nn.init.normal_(made.outer.weight)
    return made


def test_before_training_it_is_the_plain_mixture(said, features):
    mixed = mixture(said, PRIOR)
    found = learned_mixture_nats(MixtureNetwork(5, 3), features, mixed.logits, said)
    np.testing.assert_allclose(found, mixed.nats, rtol=1e-12)


def test_the_mixture_equals_a_loop_over_tokens(said, features, network):
    logits = mixture(said, PRIOR).logits
    found = learned_mixture_nats(network, features, logits, said)
    for t in range(TOKENS):
        row = features[t].nan_to_num(0.0).clamp(-5, 5)
        inner = torch.tanh(network.inner.weight @ row + network.inner.bias)
        extra = (network.outer.weight @ inner + network.outer.bias).tolist()
        weights = [
            0.0 if math.isnan(s) else math.exp(z + e)
            for s, z, e in zip(said[:, t], logits[:, t], extra, strict=True)
        ]
        spoken = sum(w * math.exp(s) for w, s in zip(weights, said[:, t], strict=True) if w > 0)
        assert math.isclose(found[t], -math.log(spoken / sum(weights)), rel_tol=1e-5)


def test_probabilities_sum_to_one_whatever_the_network_says(features, network):
    vocabulary = 6
    tables = torch.randn(3, vocabulary, dtype=torch.float64).log_softmax(-1).numpy()
    logits = np.log(np.array(PRIOR))[:, None]
    total = sum(
        math.exp(-learned_mixture_nats(network, features[5:6], logits, tables[:, [token]])[0])
        for token in range(vocabulary)
    )
    assert math.isclose(total, 1.0, rel_tol=1e-9)


def test_what_comes_later_changes_no_score(said, features, network):
    before = learned_mixture_nats(network, features, mixture(said, PRIOR).logits, said)
    place = 17
    said[:, place + 1 :] -= 1.0
    features[place + 1 :] += 1.0
    said[0, place] += 0.5  # the token itself is another one
    after = learned_mixture_nats(network, features, mixture(said, PRIOR).logits, said)
    np.testing.assert_array_equal(after[:place], before[:place])
    assert (after[place:] != before[place:]).all()


def test_training_finds_the_feature_that_says_who_is_right():
    random = np.random.default_rng(6)
    tells = random.choice([-1.0, 1.0], 4000)
    right, wrong = math.log(0.9), math.log(0.05)
    said = np.stack([np.where(tells > 0, right, wrong), np.where(tells > 0, wrong, right)])
    inputs = torch.from_numpy(np.stack([tells, random.normal(size=4000)], 1)).float()
    logits = mixture(said, [0.5, 0.5]).logits
    network = fit_mixture_network(
        [inputs[:2000], inputs[2000:]], np.split(logits, 2, 1), np.split(said, 2, 1)
    )
    found = learned_mixture_nats(network, inputs, logits, said).mean()
    plain = mixture(said, [0.5, 0.5]).nats.mean()
    assert -math.log(0.9) <= found < -math.log(0.9) + 0.02
    assert plain > 0.6
    again = fit_mixture_network(
        [inputs[:2000], inputs[2000:]], np.split(logits, 2, 1), np.split(said, 2, 1)
    )
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def a_reading(seed, lengths=(12, 30), thetas=2):
    random = np.random.default_rng(seed)
    numbers = 2 + 2 * thetas + 2
    return Readings(
        [random.random(length) + 1 for length in lengths],
        [random.normal(-3, 1, (thetas, length)) for length in lengths],
        [random.normal(size=(numbers, length)).astype(np.float32) for length in lengths],
    )


def test_features_are_those_of_the_chosen_flatness():
    copies = [a_reading(0), a_reading(1)]
    found = mixture_features(copies, 1, 1).numpy()
    sure = copies[1].confidence[1]
    # Of the model; at the second flatness of two: surest, entropy; nearest and length.
    expected = [*copies[0].confidence[1][:2], *sure[:2], sure[3], sure[5], sure[6], sure[7]]
    np.testing.assert_array_equal(found.T, expected)
    without = mixture_features(copies, 0, None).numpy()
    np.testing.assert_array_equal(
        without.T, [*copies[0].confidence[0][:2], *copies[1].confidence[0][:2]]
    )


@pytest.mark.parametrize(("theta", "share"), [(None, 0.0), (1, 0.1)])
def test_copies_are_mixed_by_their_network(theta, share):
    copies = [a_reading(0), a_reading(1)]
    network = network_of_copies(copies, theta, share)
    found = nats_of_copies(copies, theta, share, network)
    for text, nats in enumerate(found):
        said, prior = [-copy.nats[text] for copy in copies], [0.5, 0.5]
        if theta is not None:
            said, prior = [*said, copies[1].cache[text][theta]], [0.45, 0.45, 0.1]
        logits = mixture(said, prior).logits
        features = mixture_features(copies, text, theta)
        expected = learned_mixture_nats(network, features, logits, np.stack(said))
        np.testing.assert_array_equal(nats, expected)
    plain = nats_of_copies(copies, theta, share)
    assert sum(n.sum() for n in found) < sum(n.sum() for n in plain)


def test_readings_without_confidence_are_refused():
    bare = Readings([np.ones(3)])
    with pytest.raises(ValueError, match=r"has not kept how sure it was; .* confidence=True"):
        mixture_features([a_reading(0), bare], 0, None)
