"""What a rule is told of the losses, and what truncation leaves of its state."""

import pytest
import torch

from metalm.meta.rules import GradientDescent
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule


class Surprised(AbstractUpdateRule):
    """W <- W - rate l g, and the sum of what was seen: the step is as large as the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.02, dtype=torch.float64))

    def initial_state(self, fast):
        rows = next(iter(fast.values())).shape[0]
        return {"loss": torch.zeros(rows).double(), "moved": torch.zeros(()).double()}

    def observe(self, state, losses, aux=None):
        return state | {"loss": losses}

    def forward(self, fast, gradients, slow, state, coefficients=None):
        loss = state["loss"] * self.rate
        new = {
            name: weight - loss.reshape(-1, *(1,) * (weight.dim() - 1)) * gradients[name]
            for name, weight in fast.items()
        }
        moved = sum(((new[name] - fast[name]) ** 2).sum() for name in fast)
        return new, state | {"moved": state["moved"] + moved}


def by_hand(tiny, state):
    """The same reading with the losses and gradients of a plain autograd call."""
    fast, rate = tiny.start(), 0.02
    for batch in tiny.batches:
        leaves = {name: weight.clone().requires_grad_() for name, weight in fast.items()}
        losses, _, following = tiny.loss({**leaves, **tiny.rest}, batch, state)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        state = following.detach()
        for weight, gradient in zip(fast.values(), gradients, strict=True):
            for row in range(tiny.rows):
                weight[row] -= rate * losses[row].item() * gradient[row]
    return losses.detach(), fast


@pytest.mark.parametrize(
    "settings",
    [{"order": 0}, {"order": 0, "overwrite": True}, {}, {"segment": 2}],
    ids=["plain", "in place", "first order", "checkpointed"],
)
def test_the_rule_sees_the_loss_of_its_own_step(settings, tiny, state):
    last, expected = by_hand(tiny, state)
    rule = Surprised()
    result = unroll(
        tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, fast=tiny.start(), **settings
    )
    torch.testing.assert_close(result.rule_state["loss"], last)
    for name, weight in expected.items():
        torch.testing.assert_close(result.fast[name].detach(), weight)


def test_other_rules_keep_their_state():
    state = object()
    assert GradientDescent(0.1).observe(state, torch.ones(3)) is state


def test_truncation_forgets_the_history_of_the_rules_state(tiny, state):
    rule = Surprised()
    first = unroll(tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, fast=tiny.start())
    assert first.rule_state["moved"].requires_grad
    second = unroll(
        tiny.loss,
        rule,
        tiny.slow,
        tiny.rest,
        tiny.batches[:1],
        state,
        fast=first.fast,
        rule_state=first.rule_state,
        truncate=True,
    )
    one_step = unroll(
        tiny.loss,
        rule,
        tiny.slow,
        tiny.rest,
        tiny.batches[:1],
        state,
        fast={name: weight.detach() for name, weight in first.fast.items()},
    )
    found = torch.autograd.grad(second.rule_state["moved"], rule.rate)
    expected = torch.autograd.grad(one_step.rule_state["moved"], rule.rate)
    torch.testing.assert_close(found, expected)
