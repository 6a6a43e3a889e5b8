"""Forks of modules: finite differences where other libraries are silently wrong."""

import gc
import weakref
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalm.meta.module_fork import fork
from metalm.meta.rules import Adam, CoordinateRates, GradientDescent
from metalm.meta.tasks import backward_over_tasks

TASKS, STEPS, WORDS = 3, 3, 7
WEIGHTS = [0.0] * STEPS + [1.0]


class Tied(nn.Module):
    """A language model whose input and output embedding are one tensor."""

    def __init__(self, core):
        super().__init__()
        self.into, self.core = nn.Embedding(WORDS, 4), core
        self.out = nn.Linear(4, WORDS)
        self.out.weight = self.into.weight

    def forward(self, tokens):
        hidden = self.core(self.into(tokens))
        return self.out(hidden[0] if isinstance(hidden, tuple) else hidden)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.norm = nn.Linear(4, 12), nn.LayerNorm(4)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (2, 2)).transpose(-2, -3) for part in self.all(x).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.norm(x + mixed.transpose(-2, -3).flatten(-2))


class Idle(nn.Module):
    """One layer of three is frozen, one is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(6, 5), nn.Linear(5, 5).requires_grad_(False)
        self.unused, self.last = nn.Linear(2, 2), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def pictures(norm):
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), norm, nn.Tanh(), nn.AvgPool1d(2),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


MODULES = {
    "tied": lambda: Tied(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
    "lstm": lambda: Tied(nn.LSTM(4, 4, batch_first=True)),
    "attention": lambda: Tied(Attention()),
    "transformer": lambda: Tied(
        nn.TransformerEncoderLayer(4, 2, 5, 0.0, functional.gelu, batch_first=True)
    ),
    "transformer in use": lambda: Tied(
        nn.TransformerEncoderLayer(4, 2, 5, 0.0, functional.gelu, batch_first=True)
    ).eval(),
    "batch statistics": lambda: pictures(nn.BatchNorm1d(4, track_running_stats=False)),
    "own running statistics": lambda: pictures(nn.BatchNorm1d(4)),
    "running statistics": lambda: pictures(nn.BatchNorm1d(4)).eval(),
    "group norm": lambda: pictures(nn.GroupNorm(2, 4)),
    "instance norm": lambda: pictures(nn.InstanceNorm1d(4, affine=True)),
    "frozen and unused": Idle,
    "dropout": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)),
}
ALONE = ("lstm",)  # no vmap


def made(kind):
    torch.manual_seed(4)
    module = MODULES[kind]().double()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return module


def batches_for(module):
    """Support, several times, and queries; [tasks, items, ...]."""
    generator = torch.Generator().manual_seed(9)

    def batch(items):
        if isinstance(module, Tied):
            tokens = torch.randint(WORDS, (TASKS, items, 5), generator=generator)
            return tokens[..., :-1], tokens[..., 1:]
        inputs = torch.randn(TASKS, items, 6, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(3, (TASKS, items), generator=generator)

    support, query = batch(4), batch(5)
    return [support] * STEPS + [query]


def loss(model, batch):
    inputs, targets = batch
    logits = model(inputs).flatten(0, -2)
    return functional.cross_entropy(logits, targets.flatten())


def run(module, rule, together=1, **options):
    """Meta-loss; the gradient is left in .grad."""

    def learn(tasks, batches):
        return fork(module, tasks=tasks).unroll(
            rule, batches, loss, weights=WEIGHTS, update_last=False, **options
        )

    torch.manual_seed(11)
    return backward_over_tasks(batches_for(module), learn, together).losses[-1].mean().item()


def gradients(module, rule, **options):
    leaves = [*module.parameters(), *rule.parameters()]
    for leaf in leaves:
        leaf.grad = None
    run(module, rule, **options)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in leaves]


def slope_along(leaf, direction, function, step=1e-4):
    """Central difference of fourth order."""
    values = []
    for times in (1, -1, 2, -2):
        with torch.no_grad():
            leaf.add_(times * step * direction)
            values.append(function())
            leaf.sub_(times * step * direction)
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)


def rule_for(module, kind="rates"):
    slow = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return CoordinateRates(slow, 0.3) if kind == "rates" else Adam(0.05, eps=0.05)


@pytest.mark.parametrize("segment", [None, 2, "auto", "least"])
@pytest.mark.parametrize("kind", MODULES)
def test_finite_differences_of_the_whole_meta_loss(kind, segment):
    module = made(kind)
    rule = rule_for(module)
    leaves = [*module.parameters(), *rule.parameters()]
    found = gradients(module, rule, segment=segment)
    generator = torch.Generator().manual_seed(2)
    slopes, products = [], []
    for leaf, gradient in zip(leaves, found, strict=True):
        if not leaf.requires_grad:
            assert leaf.grad is None
            continue
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        slopes.append(slope_along(leaf, direction, lambda: run(module, rule, order=0)))
        products.append((gradient * direction).sum().item())
    assert products == pytest.approx(slopes, rel=1e-6, abs=1e-9)


def by_double_backward(module, rate, order):
    """The meta-gradient by a graph over the whole of plain gradient descent, a task at a time."""
    slow = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = 0.0
    for task in range(TASKS):
        fast = dict(slow)
        *support, query = [tuple(part[task] for part in b) for b in batches_for(module)]
        for batch in support:
            now = loss(lambda x, w=fast: torch.func.functional_call(module, w, (x,)), batch)
            found = torch.autograd.grad(
                now, list(fast.values()), create_graph=order == 2, allow_unused=True
            )
            fast = {
                name: w if g is None else w - rate * g
                for (name, w), g in zip(fast.items(), found, strict=True)
            }
        last = loss(lambda x, w=fast: torch.func.functional_call(module, w, (x,)), query)
        total = total + last / TASKS
    leaves = list(slow.values())
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "dropout"])
def test_a_plain_graph_over_all_updates_to_the_last_digits(kind, order):
    module = made(kind)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        expected = by_double_backward(module, 0.3, order)
    every = gradients(module, GradientDescent(0.3), order=order)
    found = [g for p, g in zip(module.parameters(), every, strict=True) if p.requires_grad]
    largest = max(float(g.abs().max()) for g in expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * largest


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", ["rates", "adam"])
@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind not in (*ALONE, "dropout")])
def test_side_by_side_as_one_by_one(kind, rule, order):
    """The trap of vmap(grad) and backward: BatchNorm and LayerNorm at order 2."""
    module = made(kind)
    rule = rule_for(module, rule)
    expected = gradients(module, rule, order=order)
    before = [buffer.clone() for buffer in module.buffers()]
    for together, segment in ((None, None), (2, "auto")):
        found = gradients(module, rule, order=order, together=together, segment=segment)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    assert all(map(torch.equal, before, module.buffers()))


@pytest.mark.parametrize("segment", [None, "auto", "least"])
def test_dropout_side_by_side(segment):
    """Tasks side by side draw masks of their own; they are the same again in a recomputation."""
    module = made("dropout")
    rule = rule_for(module)
    expected = gradients(module, rule, together=None, segment=None)
    found = gradients(module, rule, together=None, segment=segment)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    leaf = module[0].weight
    direction = torch.randn_like(leaf)
    slope = slope_along(leaf, direction, lambda: run(module, rule, order=0, together=None))
    assert (found[0] * direction).sum().item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("kind", ["tied", "own running statistics", "frozen and unused"])
def test_rates_at_first_order(kind):
    """With the inner gradients held, W_K = W_0 - s G, whatever s; G is measured."""
    module = made(kind)
    rule = rule_for(module)
    found = gradients(module, rule, order=1)
    leaves = dict(module.named_parameters())
    names = [name for name in leaves if leaves[name].requires_grad]
    rates = dict(zip(names, rule.parameters(), strict=True))
    batches = batches_for(module)

    def meta_loss(task, s, start):
        own = [(x[task], y[task]) for x, y in batches]
        done = fork(module).unroll(rule, own[:-1], loss, order=0).fork
        for name in names:
            total = (leaves[name].detach() - done.fast[name]) / rates[name].detach()
            done.fast[name] = start[name] - s[name] * total
        return loss(done, own[-1]) / TASKS

    s, start = (
        {name: kind[name].detach().clone().requires_grad_() for name in names}
        for kind in (rates, leaves)
    )
    total = sum(meta_loss(task, s, start) for task in range(TASKS))
    asked = [*start.values(), *s.values()]
    expected = iter(torch.autograd.grad(total, asked, allow_unused=True))
    for leaf, gradient in zip([*leaves.values(), *rule.parameters()], found, strict=True):
        reference = next(expected) if leaf.requires_grad else None
        reference = torch.zeros_like(leaf) if reference is None else reference
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-13)


def test_running_statistics_belong_to_the_fork():
    module = made("own running statistics")
    norm, rule = module[2], rule_for(module)
    mean, count = norm.running_mean.clone(), norm.num_batches_tracked.item()
    (inputs, targets), *_ = batches_for(module)
    task = fork(module)
    done = task.unroll(rule, [(inputs[0], targets[0])] * 2, loss).fork
    done(inputs[1])
    # What torch's own module does with the same inputs under the same weights, step by step.
    twin = made("own running statistics")
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.3)
    for _ in range(2):
        optimiser.zero_grad()
        loss(twin, (inputs[0], targets[0])).backward()
        optimiser.step()
    twin(inputs[1])
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(done.buffers[name], buffer)
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked.item() == count == task.buffers["2.num_batches_tracked"]


def test_an_adapted_fork_is_a_module_call():
    """Unroll on the support, then an ordinary loss and backward: the same as weights 0 ..., 1."""
    module = made("tied")
    rule = rule_for(module)
    expected = gradients(module, rule)
    leaves = [*module.parameters(), *rule.parameters()]
    *steps, query = batches_for(module)
    for leaf in leaves:
        leaf.grad = None
    for task in range(TASKS):
        own = [(x[task], y[task]) for x, y in (*steps, query)]
        done = fork(module).unroll(rule, own[:2], loss).fork.unroll(rule, own[2:-1], loss)
        (loss(done.fork, own[-1]) / TASKS).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-14)
    # Several tasks at once: their outputs.
    several = fork(module, tasks=TASKS).unroll(rule, steps, loss, order=0).fork
    outputs = several(query[0])
    for task in range(TASKS):
        own = [(x[task], y[task]) for x, y in steps]
        alone = fork(module).unroll(rule, own, loss, order=0).fork
        torch.testing.assert_close(outputs[task], alone(query[0][task]))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_attention_in_use_side_by_side(order):
    """Torch has a kernel of its own for evaluation mode, without derivatives and without vmap."""
    module = made("transformer in use")
    *steps, query = batches_for(module)
    several = fork(module, tasks=TASKS).unroll(GradientDescent(0.1), steps, loss, order=order).fork
    outputs = several(query[0])
    for task in range(TASKS):
        own = [(x[task], y[task]) for x, y in steps]
        alone = fork(module).unroll(GradientDescent(0.1), own, loss, order=order).fork
        torch.testing.assert_close(outputs[task], alone(query[0][task]))
    assert torch.backends.mha.get_fastpath_enabled()


def test_cumulative_running_statistics_side_by_side_are_refused():
    module = pictures(nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(ValueError, match=r"expected batch normalisation with a momentum, .* '2'"):
        fork(module, tasks=2)
    fork(module.eval(), tasks=2)


def test_only_the_named_parameters_learn():
    module = made("frozen and unused")
    batch = tuple(tensor[0] for tensor in batches_for(module)[0])
    done = fork(module, ["last.*", "frozen.bias"]).unroll(GradientDescent(0.1), [batch], loss)
    assert set(done.fork.fast) == {"last.weight", "last.bias", "frozen.bias"}
    loss(done.fork, batch).backward()
    assert module.first.weight.grad.any()  # meta-learned all the same


@pytest.mark.parametrize("segment", [None, 1, "auto"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("together", [1, None])
def test_no_cycle_holds_a_task(together, order, segment):
    module = made("own running statistics")
    rule = rule_for(module, "adam")
    alive = weakref.WeakSet()

    def noted(model, batch):
        alive.update(model.fast.values())
        value = loss(model, batch)
        alive.add(value)
        return value

    def learn(tasks, batches):
        return fork(module, tasks=tasks).unroll(
            rule, batches, noted, weights=WEIGHTS, update_last=False, order=order, segment=segment
        )

    batches = batches_for(module)
    slow = {id(p) for p in module.parameters()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            backward_over_tasks(batches, learn, together)
        assert {id(tensor) for tensor in alive} <= slow
    finally:
        gc.enable()


def test_what_cannot_be_vectorised_is_refused():
    with pytest.raises(ValueError, match=r"found LSTM at .core.[^\n]*one task at a time"):
        fork(made("lstm"), tasks=2)


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="a parameter that requires a gradient, found none"):
        fork(made("tied").requires_grad_(False))


def test_a_loss_that_is_no_number_is_refused():
    module = made("frozen and unused")
    batch = tuple(tensor[0] for tensor in batches_for(module)[0])
    with pytest.raises(ValueError, match=r"expected a scalar tensor, found \[4, 3\]"):
        fork(module).unroll(GradientDescent(0.1), [batch], lambda model, batch: model(batch[0]))


@pytest.mark.parametrize(
    ("batches", "together", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(3, 3)], 1, r"found \[2, 3\]"),
        ([], 1, "found no tensor"),
        ([torch.zeros(2, 3), torch.tensor(1.0)], 1, r"found \[0, 2\]"),
        ([torch.zeros(2, 3)], 0, "expected at least 1, found 0"),
    ],
)
def test_impossible_tasks_are_refused(batches, together, message):
    with pytest.raises(ValueError, match=message):
        backward_over_tasks(batches, lambda tasks, batches: None, together)


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def test_batches_that_are_mappings_of_another_type():
    """Such as those of tokenizers."""
    module = made("frozen and unused")
    batches = batches_for(module)[:2]
    rule = GradientDescent(0.1)
    loss = lambda model, batch: functional.mse_loss(model(batch["x"]), batch["y"])  # noqa: E731
    named = [{"x": x, "y": torch.zeros(*x.shape[:-1], 3).to(x)} for x, _ in batches]
    expected = fork(module, tasks=TASKS).unroll(rule, named, loss).losses
    found = fork(module, tasks=TASKS).unroll(rule, [UserDict(b) for b in named], loss).losses
    assert torch.equal(found, expected)
    assert len(set(found[0].tolist())) == TASKS


@dataclass
class Opaque:
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Opaque(torch.zeros(2, 3)), "shows no tensors; expected a tree of tensors .* found Opaque"),
        ((torch.zeros(3, 6), torch.zeros(2, 6)), r"expected tensors \[2, ...\], found the shapes"),
        (torch.zeros(()), r"expected tensors \[2, ...\], found the shapes \[\]"),
    ],
)
def test_batches_of_other_tasks_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        fork(made("frozen and unused"), tasks=2).unroll(GradientDescent(0.1), [batch], squared)


def test_what_cannot_be_learnt_is_refused():
    module = made("frozen and unused")
    x = torch.zeros(4, 6, dtype=torch.float64)
    rule, loss = GradientDescent(0.1), lambda model, x: model(x).sum()
    with pytest.raises(ValueError, match="expected at least one fast parameter, found none"):
        fork(module, []).unroll(rule, [x], loss)
    module.count = nn.Parameter(torch.tensor(3), requires_grad=False)
    with pytest.raises(ValueError, match=r"'count' cannot learn; expected .* found int64"):
        fork(module, ["count"]).unroll(rule, [x], loss)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch.inference_mo"):
        fork(module).unroll(rule, [x], loss, order=0)
