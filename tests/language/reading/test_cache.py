import math
import re

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import CacheConfig, CacheMemory, mixed_nats

SIZE, LENGTH, VOCABULARY = 3, 17, 5
THETAS = (0.25, 0.5, 2.0)


@pytest.fixture
def past():
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(LENGTH, SIZE, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)


def brute_force(features, targets, theta, window):
    """log p_cache of each token, by a loop over positions."""
    found = []
    for t in range(len(targets)):
        total = matching = 0.0
        for i in range(max(0, t - window), t):
            weight = math.exp(theta * float(features[t] @ features[i]))
            total += weight
            matching += weight * (targets[i] == targets[t])
        if total == 0:
            found.append(math.nan)
        else:
            found.append(math.log(matching / total) if matching else -math.inf)
    return found


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("segment", [1, 3, 6, 100])
def test_cache_equals_a_loop_over_positions(past, window, segment):
    features, targets = past
    memory = CacheMemory(window)
    parts = [
        memory.score(
            features[start : start + segment],
            targets[start : start + segment],
            torch.tensor(THETAS),
        ).log_probabilities
        for start in range(0, LENGTH, segment)
    ]
    expected = [brute_force(features, targets, theta, window) for theta in THETAS]
    torch.testing.assert_close(
        torch.cat(parts, 1), torch.tensor(expected, dtype=torch.float64), equal_nan=True
    )
    assert len(memory.tokens) <= window


def test_an_empty_cache_says_nothing_and_an_unseen_token_has_no_probability():
    features = torch.ones(3, SIZE)
    found, _ = CacheMemory(9).score(features, torch.tensor([1, 2, 1]), torch.tensor([1.0]))
    assert math.isnan(found[0, 0])
    assert found[0, 1] == -math.inf
    assert math.isclose(found[0, 2], math.log(1 / 2), rel_tol=1e-6)
    nats = torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64)
    mixed = mixed_nats(nats, found[0].double(), 0.25)
    expected = [2.0, 3.0 - math.log(0.75), -math.log(0.75 * math.exp(-0.5) + 0.25 * 0.5)]
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 5, LENGTH - 1])
def test_the_mixture_sums_to_one_over_the_vocabulary(past, place):
    features, targets = past
    logits = torch.randn(VOCABULARY, dtype=torch.float64)
    for number in range(len(THETAS)):
        total = 0.0
        for token in range(VOCABULARY):
            memory = CacheMemory(6)
            memory.score(features[:place], targets[:place], torch.tensor(THETAS))
            found, _ = memory.score(
                features[place : place + 1], torch.tensor([token]), torch.tensor(THETAS)
            )
            nats = -logits.log_softmax(0)[token : token + 1]
            total += float((-mixed_nats(nats, found[number], 0.3)).exp())
        assert math.isclose(total, 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("window", [4, 100])
@pytest.mark.parametrize("segment", [1, 6, 100])
def test_confidence_equals_a_loop_over_the_vocabulary(past, window, segment):
    features, targets = past
    memory = CacheMemory(window)
    parts = [
        memory.score(
            features[start : start + segment],
            targets[start : start + segment],
            torch.tensor(THETAS),
            confidence=True,
        ).confidence
        for start in range(0, LENGTH, segment)
    ]
    expected = []
    for t in range(LENGTH):
        column = []
        for theta in THETAS:
            found = [
                brute_force(features[: t + 1], [*targets[:t], token], theta, window)[t]
                for token in range(VOCABULARY)
            ]
            entropy = -sum(math.exp(f) * f for f in found if f > -math.inf)
            column.append((max(found), entropy) if t else (math.nan, math.nan))
        products = [float(features[t] @ features[i]) for i in range(max(0, t - window), t)]
        surest, entropies = zip(*column, strict=True)
        norm = math.sqrt(sum(float(x) ** 2 for x in features[t]))
        expected.append([*surest, *entropies, max(products, default=math.nan), norm])
    torch.testing.assert_close(
        torch.cat(parts, 1), torch.tensor(expected, dtype=torch.float64).t(), equal_nan=True
    )
    none = CacheMemory(window).score(features, targets, torch.tensor(THETAS)).confidence
    assert none.shape == (0, LENGTH)


def test_no_share_is_the_model_alone():
    nats = torch.tensor([1.0, 2.0])
    assert torch.equal(mixed_nats(nats, torch.tensor([-math.inf, -0.1]), 0.0), nats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "the cache's share is a probability; expected 0 <= share < 1, found 1.0"),
        ({"share": -0.1}, "found -0.1"),
        ({"theta": 0.0}, "the cache's theta is a scale; expected a number above 0, found 0.0"),
        ({"theta": -1.0}, "found -1.0"),
        ({"window": 0}, "the cache needs a window; expected at least 1, found 0"),
    ],
)
def test_impossible_caches_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheConfig(**changes)


@pytest.mark.parametrize("seed", range(4))
def test_later_tokens_of_a_segment_change_no_bit_of_what_the_cache_said_before(seed):
    """In float32, where one zero more in a sum may round it otherwise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(300, 16, generator=generator) / 2
    targets = torch.randint(90, (300,), generator=generator)
    changed = targets.clone()
    changed[290:] = 1000 + torch.arange(10)  # new to the cache, where the others were not
    said = []
    for tokens in (targets, changed):
        memory = CacheMemory(500)
        memory.score(features[:280], tokens[:280], torch.tensor(THETAS))
        said.append(
            memory.score(features[280:], tokens[280:], torch.tensor(THETAS), confidence=True)
        )
    for one, other in zip(*said, strict=True):
        assert torch.equal(one[:, :10], other[:, :10])
