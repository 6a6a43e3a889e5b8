"""The unroll against closed forms on quadratics, plain autograd graphs and finite differences."""

import gc
import itertools
import math
import weakref

import pytest
import torch

from metalm.meta.fork import rebase
from metalm.meta.kernels import cpu_kernels
from metalm.meta.meta_gradient import graph_steps
from metalm.meta.rules import GradientDescent, LearnedRates, RmsDecay
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule


class Momentum(AbstractUpdateRule):
    """V <- beta V + g, W <- W - r V + rho (W_0 - W): a state, and the graph of any other rule."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.02, dtype=torch.float64))
        self.beta = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def initial_state(self, fast):
        return {
            "velocity": {name: torch.zeros_like(weight) for name, weight in fast.items()},
            "steps": torch.tensor(0),
        }

    def forward(self, fast, gradients, slow, state, coefficients=None):
        velocity = {n: self.beta * v + gradients[n] for n, v in state["velocity"].items()}
        new = {
            name: weight - self.rate * velocity[name] + 0.1 * (slow[name] - weight)
            for name, weight in fast.items()
        }
        return new, {"velocity": velocity, "steps": state["steps"] + 1}


def learned_rule(tiny, granularity="tensor", decay_shape="rms", decay=0.2):
    return LearnedRates(
        tiny.rms, granularity, rate=0.02, decay=decay, exponent=0.4, decay_shape=decay_shape
    )


RULES = {
    "descent": lambda tiny: GradientDescent(0.03),
    "descent, decay": lambda tiny: GradientDescent(0.03, 0.2),
    "rms": lambda tiny: RmsDecay(tiny.rms, 0.01, 0.3, 0.1),
    "tensor": learned_rule,
    "no decay": lambda tiny: learned_rule(tiny, decay=0.0),
    "row": lambda tiny: learned_rule(tiny, "row", "uniform"),
    "coordinate": lambda tiny: learned_rule(tiny, "coordinate"),
    "momentum": lambda tiny: Momentum(),
}


def leaves_of(tiny, rule):
    return [*tiny.slow.values(), *tiny.rest.values(), *rule.parameters()]


def plain_unroll(tiny, rule, state, weights, fast=None):
    """Independent: losses on the graph of the updates, taken twice, with a detached gradient."""
    fast = (
        {n: w.expand(tiny.rows, *w.shape) for n, w in tiny.slow.items()} if fast is None else fast
    )
    rule_state, total, losses = rule.initial_state(fast), 0.0, []
    for batch, weight in zip(tiny.batches, weights, strict=True):
        step_losses, _, following = tiny.loss({**fast, **tiny.rest}, batch, state)
        total = total + weight * step_losses.sum()
        losses.append(step_losses.detach())
        copies = {name: tensor.detach().requires_grad_() for name, tensor in fast.items()}
        again, _, _ = tiny.loss({**copies, **tiny.rest}, batch, state)
        gradients = torch.autograd.grad(again.sum(), list(copies.values()))
        state = following.detach()
        fast, rule_state = rule(
            fast, dict(zip(copies, gradients, strict=True)), tiny.slow, rule_state
        )
    return total, torch.stack(losses), fast, state


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "as on a GPU"])
@pytest.mark.parametrize("weights", [None, [0.0, 2.0, 1.0, 0.0, 0.5]], ids=["ones", "weights"])
@pytest.mark.parametrize("start", ["slow", "displaced"])
@pytest.mark.parametrize("kind", RULES)
def test_against_a_plain_graph(kind, start, weights, whole, tiny, state, monkeypatch):
    if whole:
        monkeypatch.setattr(cpu_kernels, "fits", lambda tensor: False)
    rule = RULES[kind](tiny)
    first = None if start == "slow" else rebase(tiny.start(), tiny.slow)
    result = unroll(
        tiny.loss,
        rule,
        tiny.slow,
        tiny.rest,
        tiny.batches,
        state,
        fast=first,
        rows=tiny.rows,
        weights=weights,
    )
    total, losses, fast, last = plain_unroll(tiny, rule, state, weights or [1.0] * 5, first)
    torch.testing.assert_close(result.meta_loss, total)
    torch.testing.assert_close(result.losses, losses)
    torch.testing.assert_close(result.state, last)
    assert [aux.tolist() for aux in result.aux] == result.losses.tolist()
    for name, weight in fast.items():
        torch.testing.assert_close(result.fast[name], weight)
    leaves = leaves_of(tiny, rule)
    # The last fast weights count too, as when another unroll goes on from them; the factor tells
    # a scaled meta-loss from a sum.
    got = torch.autograd.grad(
        0.3 * result.meta_loss + sum(w.square().sum() for w in result.fast.values()), leaves
    )
    expected = torch.autograd.grad(
        0.3 * total + sum(w.square().sum() for w in fast.values()), leaves
    )
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["descent, decay", "rms", "row"])
def test_sweep_and_graph_of_updates_agree_on_every_part(kind, tiny, state, monkeypatch):
    """Two algorithms: the closed form for linear rules, and autograd through the rule's steps."""
    rule = RULES[kind](tiny)
    leaves = leaves_of(tiny, rule)

    def gradients(last_only):
        result = unroll(tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, rows=tiny.rows)
        total = sum(w.sin().sum() for w in result.fast.values()) if last_only else result.meta_loss
        return torch.autograd.grad(total, leaves, allow_unused=True)

    swept = [gradients(last_only) for last_only in (False, True)]
    monkeypatch.setattr("metalm.meta.unroll.method_of", lambda *arguments: graph_steps)
    graphs = [gradients(last_only) for last_only in (False, True)]
    for one, two in zip(itertools.chain(*swept), itertools.chain(*graphs), strict=True):
        if one is None or two is None:
            assert all(g is None or not g.any() for g in (one, two))
        else:
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["tensor", "no decay", "coordinate", "momentum"])
def test_finite_differences_with_the_inner_gradients_held_constant(kind, tiny, state):
    rule = RULES[kind](tiny)
    result = unroll(tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, rows=tiny.rows)
    leaves = leaves_of(tiny, rule)
    gradients = torch.autograd.grad(result.meta_loss, leaves)
    frozen: list[dict] = []

    def meta_loss():
        """The same unroll; its inner gradients and states are those of the first time."""
        fast = {n: w.detach().expand(tiny.rows, *w.shape) for n, w in tiny.slow.items()}
        rule_state, now, total = rule.initial_state(fast), state, 0.0
        for index, batch in enumerate(tiny.batches):
            losses, _, following = tiny.loss({**fast, **tiny.rest}, batch, now)
            total += losses.sum().item()
            if index == len(frozen):
                copies = {name: tensor.detach().requires_grad_() for name, tensor in fast.items()}
                again = tiny.loss({**copies, **tiny.rest}, batch, now)[0].sum()
                inner = torch.autograd.grad(again, list(copies.values()))
                frozen.append(
                    {"g": dict(zip(copies, inner, strict=True)), "state": following.detach()}
                )
            now = frozen[index]["state"]
            with torch.no_grad():
                fast, rule_state = rule(fast, frozen[index]["g"], tiny.slow, rule_state)
        return total

    assert meta_loss() == pytest.approx(result.meta_loss.item(), rel=1e-12)
    generator = torch.Generator().manual_seed(2)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(sign * step * direction)
                values.append(meta_loss())
                leaf.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def quadratic(parameters, batch, state):
    """0.5 (t - a)^T A (t - a)."""
    matrix, centre = batch
    away = parameters["t"] - centre
    return 0.5 * away @ matrix @ away, None, state


class TestQuadratic:
    """Closed forms: t_k = a + (I - rA)^k (t_0 - a); first order leaves the plain gradient."""

    rate, steps = 0.1, 4

    @pytest.fixture
    def problem(self):
        generator = torch.Generator().manual_seed(4)
        root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        first, inner, outer = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        return root @ root.T / 5, first, inner, outer

    def run(self, problem, rule):
        matrix, first, inner, outer = problem
        slow = {"t": first.clone().requires_grad_()}
        query = (torch.eye(5, dtype=torch.float64), outer)
        batches = [*[(matrix, inner)] * self.steps, query]
        weights = [0.0] * self.steps + [1.0]
        return slow["t"], unroll(quadratic, rule, slow, {}, batches, None, weights=weights)

    def adapted(self, problem):
        matrix, first, inner, _ = problem
        power = torch.linalg.matrix_power(torch.eye(5) - self.rate * matrix, self.steps)
        return inner + power @ (first - inner)

    def test_trajectory_and_outer_loss(self, problem):
        _, result = self.run(problem, GradientDescent(self.rate))
        adapted, outer = self.adapted(problem), problem[3]
        expected = 0.5 * (adapted - outer).square().sum()
        torch.testing.assert_close(result.meta_loss.detach(), expected)
        torch.testing.assert_close(
            result.fast["t"].detach(), adapted - self.rate * (adapted - outer)
        )

    def test_first_order_gradient_is_the_plain_one_at_the_adapted_point(self, problem):
        slow, result = self.run(problem, GradientDescent(self.rate))
        result.meta_loss.backward()
        torch.testing.assert_close(slow.grad, self.adapted(problem) - problem[3])

    def test_decay_does_not_change_the_gradient_to_the_slow_weights(self, problem):
        """Shifting W_0 shifts every W_t as much, whatever the decay."""
        slow, result = self.run(problem, GradientDescent(self.rate, 0.3))
        (to_slow,) = torch.autograd.grad(result.meta_loss, [slow])
        adapted = (result.fast["t"].detach() - self.rate * problem[3] - 0.3 * slow.detach()) / (
            1 - self.rate - 0.3
        )
        torch.testing.assert_close(to_slow, adapted - problem[3])

    def test_gradient_to_the_learned_rate(self, problem):
        """W_k = W_0 - r sum g, so r dJ/dr = (t_k - t_0) . (t_k - b)."""
        rms = {"t": torch.ones(5, dtype=torch.float64)}
        rule = LearnedRates(rms, rate=self.rate, decay=0.0, exponent=0.0)
        _, result = self.run(problem, rule)
        result.meta_loss.backward()
        adapted = self.adapted(problem)
        expected = (adapted - problem[1]) @ (adapted - problem[3])
        torch.testing.assert_close(rule.learned("log_rate", "t").grad, expected)

    def test_gradient_to_the_learned_decay(self, problem):
        """Without a rate, W_k - W_0 = (1 - rho)^k D for a first displacement D."""
        matrix, first, _, outer = problem
        rms = {"t": torch.ones(5, dtype=torch.float64)}
        rule = LearnedRates(rms, rate=1e-300, decay=0.3, exponent=0.0)
        displaced = first + torch.arange(5.0)
        result = unroll(
            quadratic,
            rule,
            {"t": first},
            {},
            [(matrix, outer)] * 3,
            None,
            fast={"t": displaced},
            weights=[0, 0, 1],
        )
        result.meta_loss.backward()
        last = first + 0.7**2 * (displaced - first)
        slope = -2 * 0.7 * (displaced - first) @ matrix @ (last - outer)
        torch.testing.assert_close(rule.learned("decay_logit", "t").grad, 0.3 * 0.7 * slope)

    def test_first_order_error_vanishes_with_the_rate(self):
        """Against the exact gradient of two steps on a loss that is not quadratic: order one."""
        first = torch.tensor([0.4, -0.8], dtype=torch.float64)

        def loss(parameters, batch, state):
            return (parameters["t"].exp() * batch).sum(), None, state

        batches = list(torch.tensor([[1.0, 0.5], [0.3, 2.0], [1.5, 0.7]], dtype=torch.float64))
        errors = []
        for rate in (0.02, 0.01, 0.005):
            slow = first.clone().requires_grad_()
            result = unroll(loss, GradientDescent(rate), {"t": slow}, {}, batches, None)
            (ours,) = torch.autograd.grad(result.meta_loss, [slow])
            weight, total = slow, 0.0
            for batch in batches:
                value, _, _ = loss({"t": weight}, batch, None)
                total = total + value
                (gradient,) = torch.autograd.grad(value, [weight], create_graph=True)
                weight = weight - rate * gradient
            (exact,) = torch.autograd.grad(total, [slow])
            errors.append((ours - exact).norm().item())
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("kind", ["row", "momentum"])
def test_truncation_is_two_unrolls_with_the_displacement_held(kind, tiny, state):
    rule = RULES[kind](tiny)
    leaves = leaves_of(tiny, rule)

    def two(cut, run, **options):
        fast, now, total = None, state, 0.0
        for batches in (tiny.batches[:2], tiny.batches[2:]):
            part = tiny._replace(batches=batches)
            fast = None if fast is None else cut(fast)
            loss, fast, now = run(part, now, fast, **options)
            total = total + loss
        return torch.autograd.grad(total, leaves)

    def ours(part, now, fast, truncate):
        result = unroll(
            part.loss, rule, part.slow, part.rest, part.batches, now, fast=fast, rows=part.rows,
            truncate=truncate,
        )  # fmt: skip
        return result.meta_loss, result.fast, result.state

    def plain(part, now, fast):
        total, _, fast, now = plain_unroll(part, rule, now, [1.0] * len(part.batches), fast)
        return total, fast, now

    def hold(fast):
        return {n: tiny.slow[n] + (w - tiny.slow[n]).detach() for n, w in fast.items()}

    expected = two(hold, plain)
    cuts = [(lambda fast: rebase(fast, tiny.slow), False), (lambda fast: fast, True)]
    for cut, truncate in cuts:
        for one, other in zip(two(cut, ours, truncate=truncate), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["tensor", "momentum"])
def test_forward_copies_are_the_fast_weights_themselves(kind, tiny, state):
    seen = []

    def loss(parameters, batch, now):
        seen.append({name: parameters[name].data_ptr() for name in tiny.slow})
        assert all(parameters[name].is_leaf for name in parameters)
        return tiny.loss(parameters, batch, now)

    arguments = (loss, RULES[kind](tiny), tiny.slow, tiny.rest)
    first = unroll(*arguments, tiny.batches[:1], state, rows=tiny.rows)
    assert seen[0] == {name: weight.data_ptr() for name, weight in tiny.slow.items()}
    unroll(*arguments, tiny.batches[1:2], first.state, fast=first.fast)
    assert seen[1] == {name: weight.data_ptr() for name, weight in first.fast.items()}


def test_the_callers_tensors_are_left_alone(tiny, state):
    start = tiny.start()
    copies = {name: weight.clone() for name, weight in start.items()}
    for order in (0, 1):
        for kind in ("tensor", "momentum"):
            unroll(
                tiny.loss, RULES[kind](tiny), tiny.slow, tiny.rest, tiny.batches, state,
                fast=start, order=order,
            )  # fmt: skip
            assert all(torch.equal(start[name], copies[name]) for name in start)


@pytest.mark.parametrize("kind", RULES)
def test_order_nought_adapts_alike_and_has_no_gradient(kind, tiny, state):
    rule = RULES[kind](tiny)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state)
    plain = unroll(*arguments, rows=tiny.rows, order=0)
    first = unroll(*arguments, rows=tiny.rows, order=1)
    assert torch.equal(plain.losses, first.losses)
    torch.testing.assert_close(plain.meta_loss, first.meta_loss.detach())
    assert not plain.meta_loss.requires_grad
    for name, weight in plain.fast.items():
        assert not weight.requires_grad
        assert torch.equal(weight, first.fast[name])


@pytest.mark.parametrize("kind", ["tensor", "momentum"])
def test_overwriting_gives_the_same_bits_in_the_callers_memory(kind, tiny, state):
    arguments = (tiny.loss, RULES[kind](tiny), tiny.slow, tiny.rest, tiny.batches, state)
    expected = unroll(*arguments, fast=tiny.start(), order=0)
    start = tiny.start()
    result = unroll(*arguments, fast=start, order=0, overwrite=True)
    assert torch.equal(result.losses, expected.losses)
    for name, weight in start.items():
        assert result.fast[name].data_ptr() == weight.data_ptr()
        assert torch.equal(weight, expected.fast[name])


def test_slow_weights_are_never_overwritten(tiny, state):
    arguments = (tiny.loss, GradientDescent(0.1), tiny.slow, tiny.rest, tiny.batches, state)
    with pytest.raises(ValueError, match="found no fast weights"):
        unroll(*arguments, order=0, overwrite=True)
    with pytest.raises(ValueError, match="found order 1"):
        unroll(*arguments, fast=tiny.start(), overwrite=True)


def test_frozen_parameters_get_nothing_and_change_nothing_else(tiny, state):
    rule = learned_rule(tiny)
    arguments = (tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state)
    phi = list(rule.parameters())
    free = torch.autograd.grad(unroll(*arguments, rows=tiny.rows).meta_loss, phi)
    for tensor in (*tiny.slow.values(), *tiny.rest.values()):
        tensor.requires_grad_(False)
    frozen = torch.autograd.grad(unroll(*arguments, rows=tiny.rows).meta_loss, phi)
    for one, two in zip(free, frozen, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_without_rows_fast_weights_are_like_slow_ones(tiny, state):
    one = tiny._replace(rows=1, batches=[(x[:1], y[:1]) for x, y in tiny.batches])
    rule = learned_rule(tiny)
    leaves = leaves_of(tiny, rule)
    rows = unroll(one.loss, rule, one.slow, one.rest, one.batches, state[:1], rows=1)
    none = unroll(one.loss, rule, one.slow, one.rest, one.batches, state[:1])
    assert {n: w.shape for n, w in none.fast.items()} == {n: w.shape for n, w in one.slow.items()}
    got, expected = (torch.autograd.grad(r.meta_loss, leaves) for r in (none, rows))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_do_not_meet(tiny, state):
    """Reading three rows at once gives what each gives alone, and the sum of their gradients."""
    rule = learned_rule(tiny)
    leaves = leaves_of(tiny, rule)
    together = unroll(tiny.loss, rule, tiny.slow, tiny.rest, tiny.batches, state, rows=tiny.rows)
    total = 0.0
    for row in range(tiny.rows):
        batches = [(x[row : row + 1], y[row : row + 1]) for x, y in tiny.batches]
        now = state[row : row + 1]
        alone = unroll(tiny.loss, rule, tiny.slow, tiny.rest, batches, now, rows=1)
        torch.testing.assert_close(alone.losses[:, 0], together.losses[:, row])
        total = total + alone.meta_loss
    got, expected = (torch.autograd.grad(j, leaves) for j in (together.meta_loss, total))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_weight_that_the_loss_ignores_only_decays(tiny, state):
    slow = {**tiny.slow, "idle": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    start = {**tiny.start(), "idle": torch.full((tiny.rows, 3), 2.0, dtype=torch.float64)}
    result = unroll(
        tiny.loss, GradientDescent(0.03, 0.5), slow, tiny.rest, tiny.batches, state, fast=start
    )
    torch.testing.assert_close(
        result.fast["idle"].detach(), torch.full((tiny.rows, 3), 1 + 0.5**5, dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", ["tensor", "momentum"])
def test_nothing_waits_for_the_garbage_collector(kind, tiny, state):
    rule = RULES[kind](tiny)
    watched: list[weakref.ref] = []

    def loss(parameters, batch, now):
        result = tiny.loss(parameters, batch, now)
        watched.extend(weakref.ref(tensor) for tensor in (*parameters.values(), result[0]))
        return result

    fixed = {id(tensor) for tensor in (*tiny.slow.values(), *tiny.rest.values())}
    gc.collect()
    gc.disable()
    try:
        for segment in (None, 2):
            result = unroll(
                loss, rule, tiny.slow, tiny.rest, tiny.batches, state,
                rows=tiny.rows, segment=segment,
            )  # fmt: skip
            result.meta_loss.backward()
            del result
        alive = [ref() for ref in watched if ref() is not None and id(ref()) not in fixed]
        assert len(watched) > 50
        assert alive == []
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["descent", "tensor", "momentum"])
def test_first_order_takes_each_loss_once(kind, tiny, state):
    """No second forward pass; with checkpoints, what is recomputed comes once more at most."""
    calls = []

    def loss(*arguments):
        calls.append(1)
        return tiny.loss(*arguments)

    found = []
    for segment in (None, 2):
        calls.clear()
        result = unroll(
            loss, RULES[kind](tiny), tiny.slow, tiny.rest, tiny.batches, state,
            rows=tiny.rows, segment=segment,
        )  # fmt: skip
        result.meta_loss.backward()
        found.append(len(calls))
    steps = len(tiny.batches)
    assert found[0] == steps
    assert steps <= found[1] <= 2 * steps


def test_refused_orders_and_lengths(tiny, state):
    arguments = (tiny.loss, GradientDescent(0.1), tiny.slow, tiny.rest)
    with pytest.raises(ValueError, match=r"0 \(none\), 1 \(first order\) or 2 \(exact\), found 3"):
        unroll(*arguments, tiny.batches, state, rows=tiny.rows, order=3)
    with pytest.raises(ValueError, match="'reverse' or 'forward', found 'backward'"):
        unroll(*arguments, tiny.batches, state, rows=tiny.rows, mode="backward")
    with pytest.raises(ValueError, match="at least one batch"):
        unroll(*arguments, [], state, rows=tiny.rows)
    with pytest.raises(ValueError, match="expected 5, found 2"):
        unroll(*arguments, tiny.batches, state, rows=tiny.rows, weights=[1.0, 1.0])


def test_numbers_that_blow_up_are_passed_on(tiny, state):
    """Whoever reads decides what to do about them."""
    inputs = [(x * math.inf, y) if i == 2 else (x, y) for i, (x, y) in enumerate(tiny.batches)]
    result = unroll(
        tiny.loss,
        GradientDescent(0.1),
        tiny.slow,
        tiny.rest,
        inputs,
        state,
        rows=tiny.rows,
        order=0,
    )
    assert not result.losses[2].isfinite().any()
