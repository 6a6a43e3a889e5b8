import math

import numpy as np
import pytest
import torch

from metalm.adapt.token_losses import token_nats
from metalm.language.network.prediction import FullPrediction
from metalm.language.network.segment_loss import SegmentLoss, SegmentScore, confidence, lost_rows
from metalm.language.text.article_batches import SegmentBatch

TIME, ROWS, VOCABULARY = 4, 3, 11


@pytest.fixture
def batch():
    random = np.random.default_rng(1)
    inputs, targets = (torch.from_numpy(random.integers(0, 11, (TIME, ROWS))) for _ in "it")
    mask = torch.ones(TIME, ROWS)
    mask[2:, 1] = 0
    return SegmentBatch(inputs, targets, mask)


def test_loss_is_the_sum_of_the_tokens_over_a_full_segment(tiny_model, batch, plain_nats):
    model = tiny_model()
    parameters = dict(model.named_parameters())
    losses, score, _ = SegmentLoss(model, 7)(parameters, batch, model.initial_state(ROWS))
    for row in range(ROWS):
        state = [(layer.hidden[row], layer.cell[row]) for layer in model.initial_state(ROWS)]
        nats, _, _ = plain_nats(parameters, batch.inputs[:, row], batch.targets[:, row], state)
        expected = nats * batch.mask[:, row]
        torch.testing.assert_close(score.nats[:, row], expected.detach())
        torch.testing.assert_close(losses[row], expected.sum() / 7)
    assert not score.nats.requires_grad
    assert not score.features.requires_grad


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(tiny_model, batch):
    model = tiny_model()
    parameters = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    _, score, _ = SegmentLoss(model, TIME)(parameters, batch, model.initial_state(ROWS))
    expected = math.log(VOCABULARY) * batch.mask.double()
    torch.testing.assert_close(score.nats, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_score_as_uniform_whatever_the_target(bad):
    logits = torch.randn(TIME, ROWS, VOCABULARY, dtype=torch.float64)
    broken = logits.clone()
    broken[1, 2, 5] = bad
    targets = torch.full((TIME, ROWS), 6)
    fine, found = (FullPrediction(each).scores(targets) for each in (logits, broken))
    assert found[1, 2] == math.log(VOCABULARY)
    targets[1, 2] = 5
    assert FullPrediction(broken).scores(targets)[1, 2] == math.log(VOCABULARY)
    found[1, 2] = fine[1, 2]
    assert torch.equal(found, fine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_scored_in_float32(dtype):
    logits = torch.randn(TIME, ROWS, VOCABULARY).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TIME, ROWS))
    expected = -logits.double().log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(token_nats(logits, targets).double(), expected)


def test_confidence_of_known_distributions():
    logits = torch.zeros(1, 4, 8, dtype=torch.float64)
    logits[0, 1, 3] = math.log(7)  # a half, and seven times a fourteenth
    logits[0, 2, 5] = 1e4
    logits[0, 3, 5] = math.nan
    found = confidence(logits)[:, 0]
    mixed = 0.5 * math.log(2) + 0.5 * math.log(14)
    expected = [
        [-math.log(8), -math.log(2), 0.0, -math.log(8)],
        [math.log(8), mixed, 0.0, math.log(8)],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_one_rare_word_at_the_end_is_no_lost_row():
    """Twice the uniform guess over a few tokens says nothing; over more, the row is lost."""
    bad = 2.5 * math.log(VOCABULARY)
    for tokens, lost in ((1, False), (2, False), (4, True), (6, True)):
        mask = torch.zeros(6, 2)
        mask[:tokens, 0] = mask[:, 1] = 1
        nats = mask.clone()
        nats[:, 0] *= bad
        score = SegmentScore(nats, torch.zeros(6, 2, 1))
        batch = SegmentBatch(mask.long(), mask.long(), mask)
        assert lost_rows(score, batch, VOCABULARY).tolist() == [lost, False]
