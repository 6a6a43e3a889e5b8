"""What a fork does stays its own: layers under two names, buffers that are replaced."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from metalm.meta.module_fork import fork
from metalm.meta.rules import GradientDescent


class Shared(nn.Module):
    """One layer under two names, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.b, self.again = self.a, self.norm
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.again(torch.tanh(self.b(self.norm(torch.tanh(self.a(x)))))))


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_layer_under_two_names_stays_the_modules_own(order, tasks):
    torch.manual_seed(1)
    module = Shared().double()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    lead = () if tasks is None else (tasks,)
    x, y = (torch.randn(*lead, 6, width, dtype=torch.float64) for width in (5, 2))
    done = fork(module, tasks=tasks).unroll(
        GradientDescent(0.3), [(x, y)] * 3, squared, order=order
    )
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
        assert isinstance(parameter, nn.Parameter)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    if order < 2:
        return
    done.meta_loss.backward()
    total = 0.0
    for task in range(tasks or 1):  # by hand, with a copy that holds the layers once
        weights = dict(module.named_parameters())
        inputs, targets = (t if tasks is None else t[task] for t in (x, y))
        for _ in range(3):
            linear = lambda v, w=weights: functional.linear(v, w["a.weight"], w["a.bias"])  # noqa: E731
            norm = lambda v, w=weights: functional.batch_norm(  # noqa: E731
                v, None, None, w["norm.weight"], w["norm.bias"], training=True
            )
            hidden = norm(torch.tanh(linear(norm(torch.tanh(linear(inputs))))))
            said = functional.linear(hidden, weights["out.weight"], weights["out.bias"])
            loss = (said - targets).square().mean()
            total = total + loss
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            pairs = zip(weights.items(), found, strict=True)
            weights = {name: weight - 0.3 * gradient for (name, weight), gradient in pairs}
    expected = torch.autograd.grad(total, list(module.parameters()))
    torch.testing.assert_close(done.meta_loss, total, rtol=1e-12, atol=0)
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


class Averaging(nn.Module):
    """Puts a new tensor in place of its buffer, by which it divides."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("mean", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return self.weight * x / self.mean


@pytest.mark.parametrize("tasks", [None, 3])
def test_a_buffer_that_is_replaced_belongs_to_the_fork(tasks):
    module = Averaging()
    lead = () if tasks is None else (tasks,)
    batches = [torch.rand(*lead, 4, dtype=torch.float64) + 0.5 for _ in range(3)]
    done = fork(module, tasks=tasks).unroll(
        GradientDescent(0.1), batches, lambda model, x: model(x).square().mean(), order=1
    )
    assert module.mean == 1.0
    for task in range(tasks or 1):
        weight, mean, losses = 2.0, 1.0, []
        for batch in batches:
            x = batch if tasks is None else batch[task]
            mean = 0.9 * mean + 0.1 * float(x.mean())
            square = float(x.square().mean()) / mean**2
            losses.append(weight**2 * square)
            weight -= 0.1 * 2 * weight * square
        at = ... if tasks is None else task
        assert done.fork.buffers["mean"][at].item() == pytest.approx(mean, rel=1e-14)
        assert done.losses[:, at].squeeze(-1).tolist() == pytest.approx(losses, rel=1e-13)
