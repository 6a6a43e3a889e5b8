"""Low-rank fast weights against sums W_0 + U V written out, for shared and for own factors."""

import copy

import pytest
import torch
from torch import nn

from metalm.meta.low_rank import LowRank
from metalm.meta.parameters import call, choose, split
from metalm.meta.rules import GradientDescent
from metalm.meta.unroll import unroll

ROWS, LENGTH = 3, 4


class Tied(nn.Module):
    """Tokens -> scores of tokens; input and output embedding are one, all weights may have rows."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 5
        self.embedding = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5, bias=False)
        self.out = nn.Linear(5, 7)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        """tokens [rows, length] -> [rows, length, 7]."""
        assert self.out.weight is self.embedding.weight
        embedding = self.embedding.weight.expand(len(tokens), 7, 5)
        values = embedding.gather(1, tokens[..., None].expand(*tokens.shape, 5))
        values = torch.tanh(values @ self.mix.weight.mT)
        return values @ embedding.mT + self.out.bias.reshape(-1, 1, 7)


@pytest.fixture
def module():
    torch.manual_seed(4)
    return Tied().double()


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 7, (ROWS, LENGTH), generator=generator)


def displaced(parameters, rows=ROWS):
    generator = torch.Generator().manual_seed(5)
    return {
        name: weight.detach()
        + 0.3 * torch.randn(rows, *weight.shape, generator=generator, dtype=torch.float64)
        for name, weight in parameters.items()
    }


def by_hand(module, factors, tokens):
    """Each row through a module of its own, whose weights are the sums."""
    outputs = []
    for row, line in enumerate(tokens):
        own = copy.deepcopy(module)
        with torch.no_grad():
            for name in ("embedding", "mix"):
                left = factors[f"factors.{name}/weight.left"][row]
                right = factors[f"factors.{name}/weight.right"][row]
                getattr(own, name).weight += left @ right
        outputs.append(own(line[None])[0])
    return torch.stack(outputs)


def test_starts_as_the_module(module, tokens):
    for basis in ("random", "principal"):
        low = LowRank(module, ["*.weight"], rank=2, basis=basis)
        assert torch.equal(low(tokens), module(tokens))


def test_rows_have_sums_of_their_own(module, tokens):
    low = LowRank(module, ["*.weight"], rank=2)
    slow, rest = split(low, choose(low, ["factors.*"]))
    fast = displaced(slow)
    found = call(low, {**rest, **fast}, tokens)
    torch.testing.assert_close(found, by_hand(module, fast, tokens), rtol=1e-12, atol=1e-12)


def test_other_tensors_may_be_fast_beside_them(module, tokens):
    low = LowRank(module, ["mix.weight"], rank=2)
    slow, rest = split(low, choose(low, ["factors.*", "module.out.bias"]))
    fast = displaced(slow)
    found = call(low, {**rest, **fast}, tokens)
    change = fast["factors.mix/weight.left"] @ fast["factors.mix/weight.right"]
    weights = {
        "embedding.weight": module.embedding.weight,
        "mix.weight": module.mix.weight + change,
        "out.bias": fast["module.out.bias"],
    }
    torch.testing.assert_close(found, call(module, weights, tokens), rtol=1e-12, atol=1e-12)


def loss(low):
    def squares(parameters, tokens, state):
        outputs = call(low, parameters, tokens)
        return outputs.square().mean((1, 2)), None, state

    return squares


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_by_finite_differences(order, module, tokens):
    """Second order: of the whole meta-loss. First: of one loss alone, where both are the same."""
    low = LowRank(module, ["*.weight"], rank=2)
    batches = [tokens, tokens.flip(1), tokens.roll(1)][: None if order == 2 else 1]
    with torch.no_grad():
        for factor in low.factors.parameters():
            factor.add_(0.2 * factor.new_tensor(range(factor.numel())).sin().view_as(factor))

    def meta_loss():
        slow, rest = split(low, choose(low, ["factors.*"]))
        rule = GradientDescent(0.3, 0.1)
        result = unroll(loss(low), rule, slow, rest, batches, None, rows=ROWS, order=order)
        return result.meta_loss

    names = [name for name, _ in low.named_parameters()]
    leaves = [low.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(meta_loss(), leaves)
    generator = torch.Generator().manual_seed(7)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                leaf.add_(sign * 1e-6 * direction)
            if sign != 1 or not values:
                values.append(meta_loss().item())
        slope = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_updates_are_those_of_the_factors(module, tokens):
    low = LowRank(module, ["mix.weight"], rank=2)
    slow, rest = split(low, choose(low, ["factors.*"]))
    batches = [tokens, tokens.flip(0), tokens.flip(1)]
    result = unroll(loss(low), GradientDescent(0.5), slow, rest, batches, None, rows=ROWS, order=0)
    for row in range(ROWS):
        left, right = (slow[f"factors.mix/weight.{side}"].detach() for side in ("left", "right"))
        for batch in batches:
            left, right = (factor.clone().requires_grad_() for factor in (left, right))
            weights = {
                "embedding.weight": module.embedding.weight.detach(),
                "mix.weight": module.mix.weight.detach() + left @ right,
                "out.bias": module.out.bias.detach(),
            }
            cost = call(module, weights, batch[row : row + 1]).square().mean()
            pushed = torch.autograd.grad(cost, [left, right])
            left, right = left.detach() - 0.5 * pushed[0], right.detach() - 0.5 * pushed[1]
        torch.testing.assert_close(result.fast["factors.mix/weight.left"][row], left)
        torch.testing.assert_close(result.fast["factors.mix/weight.right"][row], right)


def test_memory_is_what_it_says(module):
    low = LowRank(module, ["*.weight"], rank=2)
    slow, _ = split(low, choose(low, ["factors.*"]))
    assert low.state_size() == 2 * (7 + 5) + 2 * (5 + 5)
    assert low.state_size() == sum(weight.numel() for weight in slow.values())


def test_bases_are_orthonormal_and_the_principal_one_is_that_of_the_weight(module):
    weight = module.embedding.weight.detach()
    for basis in ("random", "principal"):
        low = LowRank(module, ["embedding.*"], rank=3, basis=basis)
        right = low.get_parameter("factors.embedding/weight.right").detach()
        torch.testing.assert_close(right @ right.T, torch.eye(3).double())
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    assert values.diff().min() > 1e-3  # else there would be no telling the directions
    torch.testing.assert_close((right @ vectors.flip(1)[:, :3]).abs(), torch.eye(3).double())


def test_tensors_of_more_dimensions():
    module = nn.Conv1d(3, 4, 2).double()
    low = LowRank(module, ["weight"], rank=2)
    with torch.no_grad():
        low.factors["weight"].left.normal_()
    factors = low.factors["weight"]
    change = (factors.left @ factors.right).view(4, 3, 2)
    inputs = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = nn.functional.conv1d(inputs, module.weight + change, module.bias)
    torch.testing.assert_close(low(inputs), expected)


def test_what_the_module_has_is_found(module):
    low = LowRank(module, ["mix.weight"], rank=1)
    assert low.size == 5
    assert low.embedding is module.embedding
    with pytest.raises(AttributeError, match="nothing"):
        _ = low.nothing


def test_saved_and_loaded(module, tokens):
    source = LowRank(module, ["*.weight"], rank=2)
    with torch.no_grad():
        for factor in source.factors.parameters():
            factor.normal_()
    target = LowRank(Tied().double(), ["*.weight"], rank=2, seed=3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(tokens), target(tokens))
    assert not torch.equal(source(tokens), module(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patterns": ["out.bias"], "rank": 1}, "'out.bias' has no rank"),
        ({"patterns": ["mix.weight"], "rank": 6}, "expected 1 to 5, found 6"),
        ({"patterns": ["mix.weight"], "rank": 0}, "expected 1 to 5, found 0"),
        ({"patterns": ["mox.weight"], "rank": 1}, "no parameter matches 'mox.weight'"),
        ({"patterns": ["*.weight"], "rank": 1, "basis": "fourier"}, "unknown basis"),
    ],
)
def test_refused_settings(settings, message, module):
    with pytest.raises(ValueError, match=message):
        LowRank(module, **settings)


def test_a_layer_under_two_names_stays_the_modules_own():
    layer = nn.Linear(4, 4)
    low = LowRank(nn.Sequential(layer, nn.Tanh(), layer), ["0.weight"], 2)
    with torch.no_grad():
        low.factors["0/weight"].left.fill_(0.1)
        weight = layer.weight
        changed = layer.weight + low.factors["0/weight"]()
        x = torch.randn(3, 4)
        expected = torch.tanh(x @ changed.t() + layer.bias) @ changed.t() + layer.bias
        torch.testing.assert_close(low(x), expected)
    assert layer.weight is weight
