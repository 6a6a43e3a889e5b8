import copy

import pytest
import torch

from metalm.language.training.nt_asgd import NtAsgd, is_non_monotone
from metalm.training.state import pack, unpack

RATE, DECAY = 0.3, 0.05


def first_trigger(losses, interval):
    """Algorithm 1 of the paper, line by line; the epoch (from 0) at which it averages, or None."""
    logs = []
    for t, v in enumerate(losses):
        if t > interval and v > min(logs[i] for i in range(0, t - interval)):
            return t
        logs.append(v)
    return None


@pytest.mark.parametrize("interval", [0, 1, 2, 5])
def test_the_trigger_is_that_of_the_paper(interval):
    generator = torch.Generator().manual_seed(interval)
    found = set()
    for _ in range(60):
        noise = torch.rand(14, generator=generator) * 0.5
        losses = [5.0 * 0.4**n + float(noise[n]) for n in range(14)]
        own = next((n for n in range(14) if is_non_monotone(losses[:n], losses[n], interval)), None)
        assert own == first_trigger(losses, interval)
        found.add(own)
    assert len(found) > 2


def test_losses_that_fall_never_trigger():
    losses = [1.0 / (1 + n) for n in range(30)]
    assert not any(is_non_monotone(losses[:n], losses[n], 5) for n in range(30))
    # Equal is not worse; a loss above the oldest that counts is, however high those between.
    assert not is_non_monotone([2.0, 9.0], 2.0, 1)
    assert is_non_monotone([2.0, 9.0], 2.1, 1)
    assert not is_non_monotone([2.0], 2.1, 1)


@pytest.fixture
def problem():
    """Weights of two shapes, and a gradient of them for every step."""
    generator = torch.Generator().manual_seed(8)
    start = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("a.weight", (2, 3)), ("b", (4,)))
    }

    def gradients(step):
        torch.manual_seed(step)
        return {name: torch.randn_like(weight) for name, weight in start.items()}

    return start, gradients


def descend(start, gradients, losses, shares, interval=1, steps_an_epoch=3):
    weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    descent = NtAsgd(weights, learning_rate=RATE, weight_decay=DECAY, interval=interval)
    step = 0
    for loss in losses:
        for _ in range(steps_an_epoch):
            for name, gradient in gradients(step).items():
                weights[name].grad = gradient
            descent.step(0.0, shares[step % len(shares)])
            step += 1
        descent.end_epoch(loss)
    return weights, descent


def test_steps_and_averages_equal_a_naive_loop(problem):
    """Averaging begins after the third epoch; the fifth is the best of those evaluated."""
    start, gradients = problem
    losses, shares = [3.0, 2.0, 3.5, 1.9, 1.0, 1.2], (1.0, 0.5, 0.25, 0.75)
    weights, descent = descend(start, gradients, losses, shares)
    plain = {name: weight.clone() for name, weight in start.items()}
    history, best = [], None
    for step in range(18):
        for name, gradient in gradients(step).items():
            plain[name] -= RATE * shares[step % 4] * (gradient + DECAY * plain[name])
        if step >= 9:
            history.append({name: weight.clone() for name, weight in plain.items()})
        if step == 14:
            best = {n: torch.stack([past[n] for past in history]).mean(0) for n in plain}
    for name in plain:
        average = torch.stack([past[name] for past in history]).mean(0)
        torch.testing.assert_close(weights[name].detach(), plain[name])
        torch.testing.assert_close(descent.weights[name], average)
        torch.testing.assert_close(descent.result[name], best[name])
        assert not torch.allclose(descent.result[name], average)


def test_averages_against_those_of_torch(problem):
    """Torch averages from the second step on: n steps of ours are (w_1 + (n - 1) of theirs) / n."""
    start, gradients = problem
    losses = [1.0, 2.0, 3.0]  # averages from the end of the third epoch
    weights, descent = descend(start, gradients, losses, (1.0,))
    theirs = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    options = {"lr": RATE, "lambd": 0.0, "t0": 0, "weight_decay": DECAY}
    optimizer = torch.optim.ASGD(list(theirs.values()), **options)
    first = None
    for step in range(50, 57):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient
            theirs[name].grad = gradient.clone()
        descent.step(0.0, 1.0)
        optimizer.step()
        first = first or {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in theirs.items():
        torch.testing.assert_close(weights[name].detach(), weight.detach())
        expected = (first[name] + 6 * optimizer.state[weight]["ax"]) / 7
        torch.testing.assert_close(descent.weights[name], expected)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_a_resumed_descent_goes_on_to_the_same_bits(problem, epochs):
    """Before the switch, at it, and while averages are taken."""
    start, gradients = problem
    losses = [1.0, 1.5, 2.0, 0.5, 0.6, 0.4]
    shares = (1.0, 0.5)
    whole, unbroken = descend(start, gradients, losses, shares)
    weights, broken = descend(start, gradients, losses[:epochs], shares)
    tree = unpack(*pack(broken.state_dict()))
    again = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    descent = NtAsgd(again, learning_rate=RATE, weight_decay=DECAY, interval=1)
    descent.load_state_dict(copy.deepcopy(tree))
    for step in range(3 * epochs, 18):
        for name, gradient in gradients(step).items():
            again[name].grad = gradient
        descent.step(0.0, shares[step % 2])
        if step % 3 == 2:
            descent.end_epoch(losses[step // 3])
    for name, weight in whole.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(unbroken.weights[name], descent.weights[name])
        assert torch.equal(unbroken.result[name], descent.result[name])
    assert descent.weights is not again
