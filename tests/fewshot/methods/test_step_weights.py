"""The queries counted after every update, against loops of plain autograd."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from metalm.fewshot.command_line import parse
from metalm.fewshot.method_names import made
from metalm.fewshot.methods.anil import Anil
from metalm.fewshot.methods.from_scratch import FromScratch
from metalm.fewshot.methods.lstm_meta_learner import LstmMetaLearner
from metalm.fewshot.methods.maml import Maml
from metalm.fewshot.methods.meta_sgd import MetaSgd
from metalm.fewshot.methods.multi_task import MultiTask
from metalm.fewshot.methods.networks import Classifier, FullyConnected
from metalm.fewshot.methods.reptile import Reptile
from metalm.fewshot.tasks.episodes import Episode
from metalm.meta.inner_problem import TwoLosses
from metalm.meta.module_fork import fork
from metalm.meta.rules import GradientDescent

TASKS, RATE, WAY = 3, 0.6, 3
WEIGHTS = (0.2, 0.3, 0.5)


def pictures():
    generator = torch.Generator().manual_seed(2)

    def drawn(each):
        targets = torch.arange(WAY).repeat(TASKS, each)
        x = torch.randn(TASKS, WAY * each, 1, 2, 2, generator=generator, dtype=torch.float64)
        return x, targets

    return Episode(*drawn(2), *drawn(4))


def classifier(statistics="transductive"):
    torch.manual_seed(5)
    body = FullyConnected(inputs=4, widths=(6, 5), statistics=statistics)
    return Classifier(body, WAY).double()


def plainly(network, episode, weights, order, rates=None, only=""):
    """The mean over tasks of sum_t w_t l(W_t; queries), W_t from the support set alone.

    Args:
        network: W_0.
        episode: the tasks.
        weights: w_1, w_2, ...
        order: 2 goes through the inner gradients.
        rates: of every parameter; RATE by default.
        only: what the names of the parameters that learn begin with.
    """
    slow = dict(network.named_parameters())
    names = [name for name in slow if name.startswith(only)]
    rates = rates or dict.fromkeys(names, RATE)
    terms = []
    for x, y, query, wanted in zip(*episode, strict=True):
        fast = dict(slow)
        for weight in weights:
            loss = functional.cross_entropy(functional_call(network, fast, (x,)), y)
            slopes = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=order == 2)
            moved = zip(names, slopes, strict=True)
            fast = fast | {name: fast[name] - rates[name] * slope for name, slope in moved}
            answers = functional_call(network, fast, (query,))
            terms.append(weight * functional.cross_entropy(answers, wanted) / TASKS)
    right = (answers.argmax(1) == wanted).double().mean().item()  # of the last task
    return torch.stack(terms).sum(), right


def same(tensors, expected):
    for found, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [WEIGHTS, (0.7, 0.0, 0.3)])
@pytest.mark.parametrize("segment", [None, 1, "auto"])
@pytest.mark.parametrize("together", [1, 2, None])
@pytest.mark.parametrize("order", [1, 2])
def test_maml_against_plain_autograd(order, together, segment, weights):
    episode, network = pictures(), classifier()
    leaves = list(network.parameters())
    meta_loss, _ = plainly(network, episode, weights, order)
    options = {"order": order, "together": together, "segment": segment}
    method = Maml(network, rate=RATE, steps=3, step_weights=weights, **options)
    measured = method.meta_gradient(episode)
    same([leaf.grad for leaf in leaves], torch.autograd.grad(meta_loss, leaves))
    assert measured.loss == pytest.approx(meta_loss.item(), rel=1e-12)


def test_the_score_is_that_after_the_last_update():
    episode = Episode(*(each[-1:] for each in pictures()))
    network = classifier()
    _, right = plainly(network, episode, WEIGHTS, 1)
    method = Maml(network, rate=RATE, steps=3, step_weights=WEIGHTS)
    assert method.meta_gradient(episode).score == pytest.approx(right)


@pytest.mark.parametrize("together", [1, None])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_sgd_against_plain_autograd(order, together):
    episode, network = pictures(), classifier()
    method = MetaSgd(
        network, rate=RATE, steps=3, step_weights=WEIGHTS, order=order, together=together
    )
    method.meta_gradient(episode)
    rates = dict(zip(dict(network.named_parameters()), method.rule.parameters(), strict=True))
    meta_loss, _ = plainly(network, episode, WEIGHTS, order, rates)
    leaves = list(method.parameters())
    same([leaf.grad for leaf in leaves], torch.autograd.grad(meta_loss, leaves))


@pytest.mark.parametrize("weights", [WEIGHTS, (0.7, 0.0, 0.3)])
@pytest.mark.parametrize("together", [1, None])
@pytest.mark.parametrize("order", [1, 2])
def test_anil_against_plain_autograd(order, together, weights):
    """The body learns through the queries at every step that counts, at order 2 through all."""
    episode, network = pictures(), classifier()
    leaves = list(network.parameters())
    meta_loss, _ = plainly(network, episode, weights, order, only="head")
    method = Anil(network, rate=RATE, steps=3, step_weights=weights, order=order, together=together)
    measured = method.meta_gradient(episode)
    same([leaf.grad for leaf in leaves], torch.autograd.grad(meta_loss, leaves))
    assert measured.loss == pytest.approx(meta_loss.item(), rel=1e-12)


@pytest.mark.parametrize("kind", [Maml, MetaSgd, Anil])
@pytest.mark.parametrize("statistics", ["transductive", "running"])
def test_all_on_the_last_update_is_the_default(kind, statistics):
    found = []
    for weights in ((), (0.0, 0.0, 1.0)):
        network = classifier(statistics)
        method = kind(network, rate=RATE, steps=3, step_weights=weights)
        measured = method.meta_gradient(pictures())
        found.append((measured, [*(p.grad for p in method.parameters()), *network.buffers()]))
    (one, tensors), (two, others) = found
    assert one == two
    assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))


@pytest.mark.parametrize("kind", [Maml, Anil])
@pytest.mark.parametrize("together", [1, None])
def test_queries_before_the_last_update_leave_running_statistics_alone(kind, together):
    """They are those of a twin that sees support and queries in turn (the rate is 0)."""
    episode, network = pictures(), classifier("running")
    twin = copy.deepcopy(network)
    method = kind(network, rate=0.0, steps=2, step_weights=(0.5, 0.5), together=together)
    method.meta_gradient(episode)
    passes = 2 if kind is Maml else 1  # ANIL's features of the support set are taken once
    averages = []
    for x, _, query, _ in zip(*episode, strict=True):
        own = copy.deepcopy(twin)
        for batch in [x] * passes + [query]:
            own(batch)
        averages.append(dict(own.named_buffers()))
    for name, buffer in network.named_buffers():
        expected = torch.stack([each[name].double() for each in averages]).mean(0)
        torch.testing.assert_close(buffer.double(), expected)


def test_what_is_learnt_from_is_the_support_set_alone():
    """In the fast weights of the unroll there is no trace of other queries."""
    ends = []
    for factor in (1.0, 7.0):
        episode, network = pictures(), classifier()
        method = Maml(network, rate=RATE, steps=3, step_weights=WEIGHTS)
        support = (episode.support_inputs[0], episode.support_targets[0])
        query = (factor * episode.query_inputs[0], episode.query_targets[0])
        ends.append(method.learn(None, [support] * 3 + [query]).fork.fast)
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_fork_takes_two_losses_without_anything_to_keep(tasks):
    """Learns from |w - a|^2, and counts |w - b|^2: W_1 = w - 2 r (w - a), J = |w - b|^2."""
    network = nn.Linear(1, 3, bias=False).double()
    goals = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]]).double()

    def loss(model, batch):
        weight = model(torch.ones(1, 1).double())[0]
        return TwoLosses((weight - batch[1]).square().sum(), (weight - batch[0]).square().sum())

    batch = goals if tasks is None else torch.stack([goals, 2 * goals])
    done = fork(network, tasks=tasks).unroll(
        GradientDescent(0.1), [batch], loss, order=1, apart=True
    )
    start = network.weight.detach()[:, 0]
    each = batch if tasks else batch[None]
    for task, (learnt, counted) in enumerate(each):
        fast = done.fork.fast["weight"][task] if tasks else done.fork.fast["weight"]
        torch.testing.assert_close(fast[:, 0], start - 0.2 * (start - learnt))
        value = done.losses[0, task] if tasks else done.losses[0]
        torch.testing.assert_close(value, (start - counted).square().sum())
    done.meta_loss.backward()
    torch.testing.assert_close(
        network.weight.grad[:, 0], sum(2 * (start - counted) for _, counted in each)
    )
    with pytest.raises(ValueError, match="do pass apart=True"):
        fork(network).unroll(GradientDescent(0.1), [goals], loss, order=1)

    def shaped(model, batch):
        return TwoLosses(loss(model, batch).counted, model.fast["weight"][:, 0])

    with pytest.raises(ValueError, match=r"expected a scalar tensor, found \[3\]"):
        fork(network).unroll(GradientDescent(0.1), [goals], shaped, order=2, apart=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.5), r"expected 3, one for each update, found 2 \(0.5 0.5\)"),
        ((0.5, -0.1, 0.6), "at least 0, found 0.5 -0.1 0.6"),
        ((0.5, math.nan, 0.6), "expected finite numbers of at least 0, found 0.5 nan 0.6"),
        ((0.5, 0.5, 0.0), "expected its step weight above 0, found 0.5 0.5 0"),
        ((0.0, 0.0, 0.0), "expected its step weight above 0, found 0 0 0"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Maml(classifier(), rate=RATE, steps=3, step_weights=weights)


@pytest.mark.parametrize(
    "made_of",
    [
        lambda n: Reptile(n, rate=0.1, steps=1, step_weights=(1.0,)),
        lambda n: FromScratch(n, steps=1, step_weights=(1.0,)),
        lambda n: MultiTask(n, step_weights=(1.0,)),
        lambda n: Maml(n, rate=0.1, steps=0, step_weights=(1.0,)),
        lambda n: LstmMetaLearner(n, steps=1, step_weights=(1.0,)),
    ],
)
def test_methods_without_such_losses_refuse_weights(made_of):
    with pytest.raises(ValueError, match=r"expected (none|no step weights).* found 1; do leave"):
        made_of(classifier())


def test_weights_from_the_command_line():
    words = ["--task", "sine", "--method", "maml"]
    (config,) = parse(words).configs
    assert made(config).shares == [0.0, 0.8, 0.2]
    assert config.trained_on.shot == config.task.shot == 5
    (config,) = parse([*words, "--adaptation.steps", "1", "--adaptation.step-weights"]).configs
    assert made(config).shares == [0.0, 1.0]
    (config,) = parse(["--task", "sine", "--method", "meta-sgd"]).configs
    assert made(config).shares == [0.0, 1.0]
    words = [*words, "--adaptation.steps", "3"]
    asked = parse([*words, "--adaptation.step-weights", "0.2", "0.3", "0.5"])
    assert made(asked.configs[0]).shares == [0.0, *WEIGHTS]
    asked = parse([*words, "--adaptation.step-weights", "0.5", "0.5"])
    with pytest.raises(ValueError, match="expected 3, one for each update, found 2"):
        made(asked.configs[0])
