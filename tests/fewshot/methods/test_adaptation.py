"""Optimization methods: closed forms on linear regression, plain autograd, torch's optimisers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from metalm.fewshot.methods.anil import Anil
from metalm.fewshot.methods.from_scratch import FromScratch
from metalm.fewshot.methods.lstm_meta_learner import LstmMetaLearner
from metalm.fewshot.methods.maml import Maml
from metalm.fewshot.methods.meta_sgd import MetaSgd
from metalm.fewshot.methods.multi_task import MultiTask
from metalm.fewshot.methods.networks import Classifier, Conv4, FullyConnected, SineNetwork
from metalm.fewshot.methods.reptile import Reptile
from metalm.fewshot.methods.transfer import Transfer
from metalm.fewshot.tasks.episodes import Episode
from metalm.training.precision import has_bfloat16

TASKS, RATE = 3, 0.11


def lines():
    """Three tasks of linear regression, and W_0 [2] as a network without a constant."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, q, slopes = drawn(TASKS, 5, 2), drawn(TASKS, 4, 2), drawn(TASKS, 2, 1)
    episode = Episode(x, x @ slopes + 0.1 * drawn(TASKS, 5, 1), q, q @ slopes)
    network = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(drawn(1, 2))
    return episode, network


def after(episode, task, start, steps):
    """W after so many steps: W* + (I - rate A)^steps (W_0 - W*), and (I - rate A)^steps."""
    x, y = episode.support_inputs[task], episode.support_targets[task, :, 0]
    curvature = 2 * x.T @ x / len(x)
    best = torch.linalg.solve(curvature, 2 * x.T @ y / len(x))
    power = torch.linalg.matrix_power(torch.eye(2).double() - RATE * curvature, steps)
    return best + power @ (start - best), power


def query_gradient(episode, task, weights):
    q, wanted = episode.query_inputs[task], episode.query_targets[task, :, 0]
    return 2 * q.T @ (q @ weights - wanted) / len(q)


def query_loss(episode, task, weights):
    q, wanted = episode.query_inputs[task], episode.query_targets[task, :, 0]
    return (q @ weights - wanted).square().mean().item()


@pytest.mark.parametrize("together", [1, 2, None])
@pytest.mark.parametrize("order", [1, 2])
def test_maml_in_closed_form(order, together):
    episode, network = lines()
    start = network.weight.detach()[0]
    measured = Maml(network, rate=RATE, steps=3, order=order, together=together).meta_gradient(
        episode
    )
    expected, losses = torch.zeros(2).double(), 0.0
    for task in range(TASKS):
        weights, power = after(episode, task, start, 3)
        slope = query_gradient(episode, task, weights)
        expected += (power @ slope if order == 2 else slope) / TASKS
        losses += query_loss(episode, task, weights) / TASKS
    torch.testing.assert_close(network.weight.grad[0], expected)
    assert measured.loss == pytest.approx(losses)
    assert measured.score == pytest.approx(losses)


@pytest.mark.parametrize("together", [1, None])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_sgd_in_closed_form(order, together):
    """One step: dJ/ds = -g_0 * l_q'(W_1), and dJ/dW_0 = (I - A diag s) l_q'(W_1)."""
    episode, network = lines()
    start = network.weight.detach()[0]
    method = MetaSgd(network, rate=RATE, steps=1, order=order, together=together)
    method.meta_gradient(episode)
    to_rates, to_start = torch.zeros(2).double(), torch.zeros(2).double()
    for task in range(TASKS):
        weights, power = after(episode, task, start, 1)
        slope = query_gradient(episode, task, weights)
        to_rates -= (start - weights) / RATE * slope / TASKS
        to_start += (power @ slope if order == 2 else slope) / TASKS
    (rates,) = method.rule.parameters()
    torch.testing.assert_close(rates.grad[0], to_rates)
    torch.testing.assert_close(network.weight.grad[0], to_start)


@pytest.mark.parametrize("tasks", [1, TASKS], ids=["serial", "batched"])
def test_reptile_in_closed_form(tasks):
    """Gradient descent at the rate e: W_0 + e (mean W_k - W_0)."""
    episode, network = lines()
    episode = Episode(*(each[:tasks] for each in episode))
    start = network.weight.detach()[0].clone()
    method = Reptile(network, rate=RATE, steps=4)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.25)
    measured = method.meta_gradient(episode)
    optimiser.step()
    ends = [after(episode, task, start, 4)[0] for task in range(tasks)]
    mean = torch.stack(ends).mean(0)
    torch.testing.assert_close(network.weight.detach()[0], start + 0.25 * (mean - start))
    losses = [query_loss(episode, task, weights) for task, weights in enumerate(ends)]
    assert measured.loss == pytest.approx(sum(losses) / tasks)


def test_reptile_with_adam_goes_on_as_one_optimiser():
    """Torch's Adam without momentum on minibatches, its second moments kept from task to task."""
    episode, network = lines()
    method = Reptile(network, rate=0.05, steps=4, batch=2, adam=True)
    twin = copy.deepcopy(network)
    start = network.weight.detach().clone()
    optimiser = torch.optim.Adam(twin.parameters(), lr=0.05, betas=(0.0, 0.999))
    torch.manual_seed(6)
    method.meta_gradient(episode)
    torch.manual_seed(6)
    ends = []
    for x, y in zip(episode.support_inputs, episode.support_targets, strict=True):
        with torch.no_grad():
            twin.weight.copy_(start)
        order = [*torch.randperm(5).tolist(), *torch.randperm(5).tolist()]
        for step in range(4):
            chosen = order[2 * step : 2 * step + 2]
            optimiser.zero_grad()
            functional.mse_loss(twin(x[chosen]), y[chosen]).backward()
            optimiser.step()
        ends.append(twin.weight.detach().clone())
    torch.testing.assert_close(network.weight.grad, start - torch.stack(ends).mean(0))
    # In use, too, a task begins at these moments.
    kept = copy.deepcopy(optimiser.state_dict())
    answers = method.predict(*episode[:3])
    for task in range(TASKS):
        with torch.no_grad():
            twin.weight.copy_(start)
        optimiser.load_state_dict(copy.deepcopy(kept))
        for _ in range(4):
            optimiser.zero_grad()
            x, y = episode.support_inputs[task], episode.support_targets[task]
            functional.mse_loss(twin(x), y).backward()
            optimiser.step()
        torch.testing.assert_close(answers[task], twin(episode.query_inputs[task]).detach())


def test_answers_after_every_step_in_closed_form():
    episode, network = lines()
    start = network.weight.detach()[0]
    method = Maml(network, rate=RATE, steps=1, test_steps=5, together=2)
    answers = method.answers_after([0, 1, 4], *episode[:3])
    assert answers.shape == (3, TASKS, 4, 1)
    for index, steps in enumerate([0, 1, 4]):
        for task in range(TASKS):
            weights, _ = after(episode, task, start, steps)
            expected = episode.query_inputs[task] @ weights
            torch.testing.assert_close(answers[index, task, :, 0], expected)
    last, _ = after(episode, 1, start, 5)
    answer = method.predict(*episode[:3])[1, :, 0]
    torch.testing.assert_close(answer, episode.query_inputs[1] @ last)


def test_training_from_scratch_is_ordinary_training():
    episode, network = lines()
    method = FromScratch(network, rate=0.05, steps=6)
    measured = method.meta_gradient(episode)
    assert not any(tensor.grad.any() for tensor in method.parameters())
    answers = method.predict(*episode[:3])
    losses = []
    for task in range(TASKS):
        twin = copy.deepcopy(network)
        optimiser = torch.optim.Adam(twin.parameters(), lr=0.05)
        for _ in range(6):
            optimiser.zero_grad()
            x, y = episode.support_inputs[task], episode.support_targets[task]
            functional.mse_loss(twin(x), y).backward()
            optimiser.step()
        expected = twin(episode.query_inputs[task]).detach()
        torch.testing.assert_close(answers[task], expected)
        losses.append(functional.mse_loss(expected, episode.query_targets[task]).item())
    assert measured.loss == pytest.approx(sum(losses) / TASKS)


def test_multi_task_is_ordinary_training_on_everything():
    episode, network = lines()
    MultiTask(network).meta_gradient(episode)
    x = torch.cat([*episode.support_inputs, *episode.query_inputs])
    y = torch.cat([*episode.support_targets, *episode.query_targets])
    expected = 2 * (x @ network.weight.detach().T - y).T @ x / len(x)
    torch.testing.assert_close(network.weight.grad, expected)
    torch.testing.assert_close(
        MultiTask(network).predict(*episode[:3]), network(episode.query_inputs).detach()
    )


def pictures(way=3, items=4):
    generator = torch.Generator().manual_seed(2)

    def drawn(each):
        targets = torch.arange(way).repeat(TASKS, each)
        x = torch.randn(TASKS, way * each, 1, 4, 4, generator=generator, dtype=torch.float64)
        return x, targets

    return Episode(*drawn(2), *drawn(items))


def classifier(statistics="transductive", way=3):
    torch.manual_seed(5)
    body = FullyConnected(inputs=16, widths=(6, 5), statistics=statistics)
    return Classifier(body, way).double()


def test_reptile_in_bfloat16_goes_nearly_the_same_way():
    """Only the training's convolutions are rounded: the way to 3 significant digits or so."""
    generator = torch.Generator().manual_seed(4)
    episode = Episode(
        torch.randn(2, 6, 1, 32, 32, generator=generator),
        torch.arange(3).repeat(2, 2),
        torch.randn(2, 3, 1, 32, 32, generator=generator),
        torch.arange(3).repeat(2, 1),
    )
    torch.manual_seed(5)
    first = Classifier(Conv4(size=32, width=8, statistics="transductive"), 3)
    ways, kinds, answers = [], [], []
    for bfloat16 in (False, True):
        network = copy.deepcopy(first)
        network.body.layers[4].register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
        method = Reptile(network, rate=0.05, steps=3, bfloat16=bfloat16)
        measured = method.meta_gradient(episode)
        ways.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        reduced = bfloat16 and has_bfloat16("cpu")
        step = torch.bfloat16 if reduced else torch.float32
        assert kinds == [step, step, step, torch.float32] * 2  # the last is the query loss shown
        assert math.isfinite(measured.loss)
        kinds.clear()
        answers.append(method.predict(*episode[:3]))
        assert set(kinds) == {torch.float32}  # never in use
        kinds.clear()
    cosine = functional.cosine_similarity(*ways, dim=0)
    assert cosine > 0.98
    assert (cosine < 1 - 1e-6) == has_bfloat16("cpu")
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("together", [1, None])
@pytest.mark.parametrize("order", [1, 2])
def test_anil_against_plain_autograd(order, together):
    episode, network = pictures(), classifier()
    measured = Anil(network, rate=0.7, steps=2, order=order, together=together).meta_gradient(
        episode
    )
    leaves = dict(network.named_parameters())
    total, right = 0.0, 0.0
    for x, y, query, wanted in zip(*episode, strict=True):
        fast = dict(leaves)
        for _ in range(2):
            loss = functional.cross_entropy(functional_call(network, fast, (x,)), y)
            heads = [name for name in fast if name.startswith("head")]
            slopes = torch.autograd.grad(loss, [fast[n] for n in heads], create_graph=order == 2)
            fast |= {n: fast[n] - 0.7 * slope for n, slope in zip(heads, slopes, strict=True)}
        logits = functional_call(network, fast, (query,))
        total = total + functional.cross_entropy(logits, wanted) / TASKS
        right += (logits.argmax(1) == wanted).double().mean().item() / TASKS
    for tensor, expected in zip(
        leaves.values(), torch.autograd.grad(total, list(leaves.values())), strict=True
    ):
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-9, atol=1e-12)
    assert measured.loss == pytest.approx(total.item())
    assert measured.score == pytest.approx(right)


METHODS = {
    "maml": lambda network, **o: Maml(network, rate=0.5, **o),
    "fomaml": lambda network, **o: Maml(network, rate=0.5, order=1, **o),
    "segments": lambda network, **o: Maml(network, rate=0.5, segment="auto", **o),
    "meta-sgd": lambda network, **o: MetaSgd(network, rate=0.5, **o),
    "anil": lambda network, **o: Anil(network, rate=0.5, **o),
    "lstm": lambda network, **o: LstmMetaLearner(network, hidden=3, **o),
    "reptile": lambda network, **o: Reptile(network, rate=0.01, adam=True, test_batch=4, **o),
    "multi-task": lambda network, **o: MultiTask(
        network, rate=0.5, **{"test_steps": o.pop("steps"), **o}
    ),
}


@pytest.mark.parametrize("queries", ["together", "alone"])
@pytest.mark.parametrize("statistics", ["transductive", "running"])
@pytest.mark.parametrize("kind", METHODS)
def test_every_method_answers_task_by_task(kind, statistics, queries):
    """Answers do not depend on the tasks beside, nor on how many are taken together; W_0 stays."""
    episode, network = pictures(), classifier(statistics)
    method = METHODS[kind](network, steps=2, queries=queries)
    support = statistics == "transductive" and queries == "alone"
    assert method.statistics == ("support" if support else statistics)
    method.train()
    method.meta_gradient(episode)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    answers = method.predict(*episode[:3])
    assert answers.shape == (TASKS, 12, 3)
    assert not answers.requires_grad
    alone = method.predict(*(each[1:2] for each in episode[:3]))
    assert torch.equal(alone[0], answers[1])
    method.together = None
    torch.testing.assert_close(method.predict(*episode[:3]), answers, rtol=1e-10, atol=1e-10)
    if statistics == "running" or queries == "alone":
        fewer = method.predict(*episode[:2], episode.query_inputs[:, :1])
        torch.testing.assert_close(fewer, answers[:, :1], rtol=1e-10, atol=1e-10)
    assert all(part.training for part in method.modules())
    after = method.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["maml", "fomaml", "meta-sgd", "anil", "lstm"])
@pytest.mark.parametrize("statistics", ["transductive", "running"])
def test_side_by_side_as_one_by_one(kind, statistics):
    found = []
    for together in (1, 2, None):
        network = classifier(statistics)
        method = METHODS[kind](network, steps=2, together=together)
        measured = method.meta_gradient(pictures())
        buffers = [buffer.double() for buffer in network.buffers()]
        found.append((measured, [*(p.grad for p in method.parameters()), *buffers]))
    for measured, tensors in found[1:]:
        assert measured == pytest.approx(found[0][0])
        for one, two in zip(tensors, found[0][1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_running_statistics_become_the_mean_over_tasks():
    """One step: support and queries of every task pass through, at the weights of that time."""
    episode, network = pictures(), classifier("running")
    twin = copy.deepcopy(network)
    Maml(network, rate=0.0, steps=1).meta_gradient(episode)
    means = []
    for x, _, query, _ in zip(*episode, strict=True):
        own = copy.deepcopy(twin)
        own(x), own(query)
        means.append(dict(own.named_buffers()))
    for name, buffer in network.named_buffers():
        expected = torch.stack([own[name].double() for own in means]).mean(0)
        torch.testing.assert_close(buffer.double(), expected)


def test_queries_alone_are_answered_with_the_support_set():
    episode, network = pictures(), classifier()
    method = Maml(network, rate=0.0, steps=1, queries="alone")
    answers = method.predict(*episode[:3])
    for task in range(TASKS):
        support = episode.support_inputs[task]
        for query in (0, 7):
            both = torch.cat([support, episode.query_inputs[task, query : query + 1]])
            torch.testing.assert_close(answers[task, query], network(both)[-1].detach())


def test_transfer_learns_all_classes_and_then_a_new_head():
    episode = pictures()
    torch.manual_seed(5)
    body = FullyConnected(inputs=16, widths=(6, 5), statistics="running").double()
    method = Transfer(body, classes=7, way=3, rate=0.4, head_only=True, test_steps=2).double()
    named = episode._replace(
        support_targets=episode.support_targets + torch.tensor([[0], [2], [4]]),
        query_targets=episode.query_targets + torch.tensor([[0], [2], [4]]),
    )
    twin = copy.deepcopy(nn.Sequential(body, method.all_classes))
    inputs = torch.cat([*named.support_inputs, *named.query_inputs])
    targets = torch.cat([*named.support_targets, *named.query_targets])
    functional.cross_entropy(twin(inputs), targets).backward()
    method.meta_gradient(named)
    for tensor, other in zip(
        [*body.parameters(), *method.all_classes.parameters()], twin.parameters(), strict=True
    ):
        torch.testing.assert_close(tensor.grad, other.grad)
    answers = method.predict(*episode[:3])
    with torch.no_grad():
        body.eval()
        features, queries = body(episode.support_inputs[1]), body(episode.query_inputs[1])
    head = nn.Linear(5, 3).double()
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.4)
    for _ in range(2):
        optimiser.zero_grad()
        functional.cross_entropy(head(features), episode.support_targets[1]).backward()
        optimiser.step()
    torch.testing.assert_close(answers[1], head(queries).detach())
    with pytest.raises(ValueError, match="expected integers below 2, found 6"):
        Transfer(body, classes=2, way=3, rate=0.4, test_steps=1).meta_gradient(named)


def test_known_networks_learn():
    """A few meta-steps lower the meta-loss of the same episode, for the networks of the room."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 6, 1, 28, 28, generator=generator)
    y = torch.arange(3).repeat(2, 2)
    for network in (
        Classifier(Conv4(width=4, statistics="transductive", pooling="stride"), 3),
        Classifier(Conv4(width=4, statistics="running"), 3),
    ):
        method = Maml(network, rate=0.5, steps=1, together=None)
        optimiser = torch.optim.Adam(method.parameters(), lr=0.01)
        losses = []
        for _ in range(8):
            optimiser.zero_grad()
            losses.append(method.meta_gradient(Episode(x, y, x, y)).loss)
            optimiser.step()
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda n: Maml(n, rate=0.1, steps=-1), "found -1 in training"),
        (lambda n: Maml(n, rate=0.1, steps=1, queries="each"), "found 'each'"),
        (lambda n: Anil(nn.Sequential(n), rate=0.1, steps=1), "expected modules 'body' and 'head'"),
        (lambda n: Reptile(n, rate=0.1, steps=1, batch=0), "expected at least 1 item, found 0"),
        (
            lambda n: Reptile(n, rate=0.1, steps=0),
            r"learns nothing; expected at least 1 .* found 0",
        ),
        (lambda n: LstmMetaLearner(n, steps=1, hidden=0), "expected >= 1 units, found 0"),
        (lambda n: FromScratch(n, steps=1), "found running ones"),
    ],
)
def test_impossible_settings_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made(classifier("running"))


def test_sine_networks_have_no_statistics():
    assert Maml(SineNetwork((3,)), rate=0.1, steps=1, queries="alone").statistics == "none"
