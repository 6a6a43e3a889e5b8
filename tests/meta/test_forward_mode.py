"""Forward mode against the untruncated reverse mode: one long unroll, or row after row."""

import pytest
import torch

from metalm.meta.forward_mode import initial_traces
from metalm.meta.kernels import cpu_kernels
from metalm.meta.rules import GradientDescent, LearnedRates, RmsDecay
from metalm.meta.step_rule import AbstractStepRule, StepSizes
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule

WEIGHTS = [1.0, 0.5, 0.0, 2.0, 1.0]
PARTS = (slice(0, 2), slice(2, 3), slice(3, 5))


class Turned(AbstractStepRule):
    """Rates below zero for some tensors, a decay for some of them only, one of them fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.03, dtype=torch.float64))
        self.decay = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def coefficients(self):
        names = ("in.weight", "out.weight", "out.bias", "scale")
        rates = dict(zip(names, (self.rate, 2 * self.rate, -self.rate / 9, 0.02), strict=True))
        decays = dict(zip(names, (self.decay, None, 0.2, self.decay**2), strict=True))
        return StepSizes(rates, decays)


RULES = {
    "descent, decay": lambda tiny: GradientDescent(0.03, 0.2),
    "rms": lambda tiny: RmsDecay(tiny.rms, 0.01, 0.3, 0.1),
    "tensor": lambda tiny: LearnedRates(tiny.rms, "tensor", 0.05, 0.2, 0.4, 1.0, "rms"),
    "row": lambda tiny: LearnedRates(tiny.rms, "row", 0.05, 0.2, 0.4),
    "coordinate": lambda tiny: LearnedRates(tiny.rms, "coordinate", 0.05, 0.2, 0.4),
    "no decay": lambda tiny: LearnedRates(tiny.rms, "tensor", 0.05, 0.0, 0.4),
    "turned": lambda tiny: Turned(),
}


@pytest.fixture(params=[False, True], ids=["rows", "as on a GPU"])
def kernels(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(cpu_kernels, "fits", lambda tensor: False)


def leaves_of(tiny, rule):
    return [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]


def assert_all_close(got, expected):
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new memory", "in place"])
@pytest.mark.parametrize("kind", RULES)
def test_many_unrolls_give_the_gradient_of_one_long_one(kind, overwrite, tiny, state, kernels):
    rule = RULES[kind](tiny)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest)
    long = unroll(*arguments, tiny.batches, state, rows=tiny.rows, weights=WEIGHTS)
    fast = {n: w.detach().expand(tiny.rows, *w.shape).clone() for n, w in tiny.slow.items()}
    traces, now, total, losses = initial_traces(rule, fast), state, 0.0, []
    for part in PARTS:
        before = {n: w.clone() for n, w in fast.items()}
        held = traces
        result = unroll(
            *arguments, tiny.batches[part], now, fast=fast, traces=traces, weights=WEIGHTS[part],
            mode="forward", overwrite=overwrite,
        )  # fmt: skip
        for name, weight in result.fast.items():
            assert (weight.data_ptr() == fast[name].data_ptr()) == overwrite
            assert torch.equal(fast[name], before[name]) != overwrite
            assert not weight.requires_grad
        same = [result.traces[n].data_ptr() == held[n].data_ptr() for n in held]
        assert all(same) if overwrite else not any(same)
        total, losses = total + result.meta_loss, [*losses, result.losses]
        fast, traces, now = result.fast, result.traces, result.state
    torch.testing.assert_close(torch.cat(losses), long.losses)
    torch.testing.assert_close(total, long.meta_loss)
    for name, weight in long.fast.items():
        torch.testing.assert_close(fast[name], weight.detach())
    leaves = leaves_of(tiny, rule)
    got, expected = (torch.autograd.grad(0.7 * j, leaves) for j in (total, long.meta_loss))
    assert_all_close(got, expected)


@pytest.mark.parametrize("kind", ["row", "turned"])
def test_an_unroll_without_fast_weights_begins_at_the_slow_ones(kind, tiny, state, kernels):
    rule = RULES[kind](tiny)
    leaves = leaves_of(tiny, rule)
    one = [(x[:1], y[:1]) for x, y in tiny.batches]
    cases = (tiny.rows, tiny.batches, state), (1, one, state[:1]), (None, one, state[:1])
    for rows, batches, start in cases:
        arguments = (tiny.loss, rule, tiny.slow, tiny.rest, batches, start)
        forward, reverse = (
            torch.autograd.grad(unroll(*arguments, rows=rows, mode=mode).meta_loss, leaves)
            for mode in ("forward", "reverse")
        )
        assert_all_close(forward, reverse)


@pytest.mark.parametrize("rows", [None, 3])
def test_slow_weights_in_another_order_of_memory(rows):
    """Transposed, or channels last: the same gradients as in reverse mode."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    turned = draw(5, 4).t().requires_grad_()
    filters = draw(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    slow = {"turned": turned, "filters": filters}
    rms = {name: draw(*weight.shape).abs() for name, weight in slow.items()}
    rule = LearnedRates(rms, "coordinate", 0.05, 0.2, 0.4, decay_shape="rms")
    inputs, pictures = draw(6, 4), draw(6, 3, 2, 2)

    def loss(parameters, batch, state):
        values = inputs[batch] @ parameters["turned"]
        seen = (pictures[batch].flatten(1)) @ parameters["filters"].flatten(-3).transpose(-1, -2)
        return (values.square().mean((-2, -1)) + torch.tanh(seen).sum((-2, -1))), None, state

    batches = [slice(0, 3), slice(2, 5), slice(1, 6)]
    found = {}
    for mode in ("reverse", "forward"):
        done = unroll(loss, rule, slow, {}, batches, None, rows=rows, mode=mode)
        leaves = [*slow.values(), *rule.parameters()]
        found[mode] = torch.autograd.grad(done.meta_loss, leaves, allow_unused=True)
    assert_all_close(found["forward"], found["reverse"])
    assert all(bool(gradient.abs().max() > 0) for gradient in found["forward"])


def test_a_row_that_begins_anew_has_only_its_own_past(tiny, state, kernels):
    """Row 1 starts again at W_0 after two steps; each row's reading alone is the answer."""
    rule = RULES["coordinate"](tiny)
    leaves = leaves_of(tiny, rule)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest)
    first = unroll(*arguments, tiny.batches[:2], state, rows=tiny.rows, mode="forward")
    with torch.no_grad():
        for name, weight in first.fast.items():
            weight[1] = tiny.slow[name]
            first.traces[name][1] = 0
        first.state[1] = state[1]
    second = unroll(
        *arguments, tiny.batches[2:], first.state,
        fast=first.fast, traces=first.traces, mode="forward",
    )  # fmt: skip
    got = torch.autograd.grad(first.meta_loss + second.meta_loss, leaves)
    total = 0.0
    for row in range(tiny.rows):
        batches = [(x[row : row + 1], y[row : row + 1]) for x, y in tiny.batches]
        for part in (batches[:2], batches[2:]) if row == 1 else (batches,):
            now = state[row : row + 1]
            total = total + unroll(*arguments, part, now, rows=1).meta_loss
    assert_all_close(got, torch.autograd.grad(total, leaves))


def test_only_what_is_learned_is_counted(tiny, state, kernels):
    rule = RULES["row"](tiny)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state)
    everything = torch.autograd.grad(
        unroll(*arguments, rows=tiny.rows, mode="forward").meta_loss, list(rule.parameters())
    )
    for tensor in (*tiny.slow.values(), *tiny.rest.values()):
        tensor.requires_grad_(False)
    for name, parameter in rule.named_parameters():
        parameter.requires_grad_(name.startswith("log_rate"))
    result = unroll(*arguments, rows=tiny.rows, mode="forward")
    assert result.traces == {}
    result.meta_loss.backward()
    for (name, parameter), expected in zip(rule.named_parameters(), everything, strict=True):
        if name.startswith("log_rate"):
            torch.testing.assert_close(parameter.grad, expected)
        else:
            assert parameter.grad is None


def test_without_grad_mode_there_are_numbers_only(tiny, state):
    rule = RULES["row"](tiny)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state)
    with torch.no_grad():
        result = unroll(*arguments, rows=tiny.rows, mode="forward")
    assert not result.meta_loss.requires_grad
    expected = unroll(*arguments, rows=tiny.rows, order=0)
    torch.testing.assert_close(result.losses, expected.losses)
    torch.testing.assert_close(result.meta_loss, expected.meta_loss)


@pytest.mark.parametrize("kind", ["row", "no decay"])
def test_memory_does_not_depend_on_the_number_of_updates(kind, tiny, state, live_bytes):
    """Beside W and g of a step: a trace like W where a decay is learned, and sums like W_0."""
    rule = RULES[kind](tiny)
    peaks = []
    for steps in (3, 30, 90):
        counter = live_bytes()
        result = unroll(
            counter.watch(tiny.loss), rule, tiny.slow, tiny.rest, (tiny.batches * steps)[:steps],
            state, rows=tiny.rows, mode="forward",
        )  # fmt: skip
        result.meta_loss.backward()
        peaks.append(counter.peak)
        assert bool(result.traces) == (kind == "row")
        del result
    assert peaks[0] == peaks[1] == peaks[2] > 0


class Other(AbstractUpdateRule):
    def forward(self, fast, gradients, slow, state, coefficients=None):
        return fast, state


class Stopped(AbstractStepRule):
    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def coefficients(self):
        names = ("in.weight", "out.weight", "out.bias", "scale")
        return StepSizes(dict.fromkeys(names, self.rate), dict.fromkeys(names))


def test_what_forward_mode_cannot_do(tiny, state):
    def run(rule, **options):
        arguments = (tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state)
        return unroll(*arguments, mode="forward", **options)

    rule, rows = RULES["row"](tiny), {"rows": tiny.rows}
    with pytest.raises(ValueError, match="expected order 1, found 2"):
        run(rule, order=2, **rows)
    with pytest.raises(ValueError, match="AbstractStepRule, found Other"):
        run(Other(), **rows)
    with pytest.raises(ValueError, match="expected no segment, found 2"):
        run(rule, segment=2, **rows)
    with pytest.raises(ValueError, match="the traces that came with them, found none"):
        run(rule, fast=tiny.start())
    with pytest.raises(ValueError, match=r"no trace of 'in.weight'.* found none"):
        run(rule, fast=tiny.start(), traces={})
    with pytest.raises(ValueError, match=r"a learned rate of 'in.weight' is zero"):
        run(Stopped(), **rows)
    with pytest.raises(ValueError, match="found no fast weights"):
        run(rule, overwrite=True, **rows)
