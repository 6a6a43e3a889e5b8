"""Choosing, splitting and calling, against modules whose names are known."""

import pytest
import torch
from torch import nn

from metalm.meta.parameters import aliases, call, choose, split


class Tied(nn.Module):
    """Embedding and output share a tensor; a bias comes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(tokens))))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*"], ("embedding.weight", "hidden.weight", "hidden.bias", "output.bias")),
        (["output.*"], ("embedding.weight", "output.bias")),
        (["*.bias", "hidden.*"], ("hidden.weight", "hidden.bias", "output.bias")),
        (["hidden.weigh?"], ("hidden.weight",)),
    ],
)
def test_choose_gives_first_names_in_module_order(patterns, names):
    assert choose(Tied(), patterns) == names


@pytest.mark.parametrize("patterns", [["lstm.*"], ["*", "Hidden.*"]])
def test_choose_names_what_there_is(patterns):
    with pytest.raises(ValueError, match=r"embedding\.weight = output\.weight, hidden\.weight"):
        choose(Tied(), patterns)


def test_choose_needs_a_pattern():
    with pytest.raises(ValueError, match="at least one name pattern"):
        choose(Tied(), [])


def test_split_gives_the_modules_own_tensors_once():
    module = Tied()
    fast, rest = split(module, choose(module, ["output.*"]))
    assert fast["embedding.weight"] is module.output.weight
    assert list(fast) == ["embedding.weight", "output.bias"]
    assert list(rest) == ["hidden.weight", "hidden.bias"]
    assert sum(t.numel() for t in (*fast.values(), *rest.values())) == 7 * 4 + 4 * 4 + 4 + 7


def test_split_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"'output\.weight'"):
        split(Tied(), ["output.weight"])


def test_call_moves_tied_names_together_and_leaves_the_module_alone():
    torch.manual_seed(0)
    module, other = Tied().double(), Tied().double()
    before = [p.clone() for p in module.parameters()]
    tokens = torch.tensor([[1, 6, 2]])
    replaced = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    output = call(module, replaced, tokens)
    torch.testing.assert_close(output, other(tokens), rtol=0, atol=0)
    output.square().sum().backward()
    other(tokens).square().sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(replaced[name].grad, p.grad, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_call_puts_back_what_a_layer_under_two_names_holds():
    module = nn.ModuleDict({"a": nn.Linear(3, 3)})
    module["b"] = module["a"]
    module.forward = lambda x: module["b"](module["a"](x))
    weight, x = module["a"].weight, torch.ones(2, 3)
    new = {name: torch.full_like(p, 0.5) for name, p in module.named_parameters()}
    assert call(module, new, x).tolist() == [[3.5] * 3] * 2  # 0.5 (3 + 1) = 2, 0.5 (6 + 1)
    assert module["a"].weight is weight
    assert aliases(module) == {}


def test_aliases_are_the_further_places_of_a_tensor():
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    module["b"], module["c"].weight = module["a"], module["a"].weight
    assert aliases(module) == {"c.weight": "a.weight"}
