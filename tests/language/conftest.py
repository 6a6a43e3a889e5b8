"""Tiny models and texts, and an independent reading of them: one article, one token at a time."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.prepared import write
from data_prep.synthetic import SyntheticText, synthetic_source
from metalm.language.network.model import LanguageModel, ModelConfig
from metalm.language.reading.methods import TrainedModels
from metalm.language.run import stages
from metalm.language.run.experiment import train
from metalm.language.run.presets import DataConfig, EvaluationConfig, ExperimentConfig
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.text.articles import SCHEMA, ArticleSet, open_corpus
from metalm.language.training.base_training import BaseTrainingConfig
from metalm.language.training.meta_training_config import JointTrainingConfig, RuleTrainingConfig
from metalm.language.tuning.tuning_text import TuningConfig
from metalm.meta.kernels import cpu_kernels
from metalm.meta.rules.gradient_descent import GradientDescent
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.rms_decay import RmsDecay
from metalm.training.record import Record

SIZES = {"vocabulary_size": 11, "embedding_size": 3, "hidden_size": 5, "num_layers": 2}
NO_DROPOUT = {"input_dropout": 0.0, "hidden_dropout": 0.0, "output_dropout": 0.0}


def _tiny_model(seed=0, dtype=torch.float64, **changes):
    """A model whose logits differ by about 1, in evaluation mode."""
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(**SIZES | NO_DROPOUT | changes)).to(dtype).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(10)
        model.decoder.bias.normal_(0, 0.5)
    return model


@pytest.fixture
def cell():
    """Of the layers of `tiny_model`; a file parametrizes it to run its tests with each."""
    return "lstm"


@pytest.fixture
def cutoffs():
    """Of the vocabulary of `tiny_model`, likewise; none is one softmax."""
    return ()


@pytest.fixture
def tiny_model(cell, cutoffs):
    return partial(_tiny_model, cell=cell, cutoffs=cutoffs, shrink=2)


@pytest.fixture
def texts():
    """Token arrays of different lengths, one of them a single token."""
    random = np.random.default_rng(5)
    lengths = (7, 1, 13, 5, 10)
    return [random.integers(0, 11, length).astype(np.int32) for length in lengths]


@pytest.fixture
def article_set():
    """Builds a set of articles from token arrays, each token a word."""

    def build(texts):
        rows = [
            {
                "title": f"article {number}",
                "text": " ".join("w" * int(token + 1) for token in tokens),
                "tokens": tokens.tolist(),
                "words": list(range(len(tokens))),
                "num_words": len(tokens),
            }
            for number, tokens in enumerate(texts)
        ]
        return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))

    return build


def _lstm_step(own, value, state):
    """Output and next state (h, c) of one layer at one token."""
    hidden, cell = state
    gates = own["input_weight"] @ value + own["hidden_weight"] @ hidden
    i, f, g, o = (gates + own["input_bias"] + own["hidden_bias"]).chunk(4)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    value = o.sigmoid() * cell.tanh()
    return value, (value, cell)


def _qrnn_step(own, value, state):
    """The same with the last input, if the layer sees it, in the place of h."""
    last, cell = state
    z, f, o = (own["input_weight"] @ torch.cat((last, value)) + own["input_bias"]).chunk(3)
    cell = f.sigmoid() * cell + (1 - f.sigmoid()) * z.tanh()
    return o.sigmoid() * cell, (value if len(last) else last, cell)


def _plain_tails(weights):
    """Number of the first token, vectors and projection of every tail."""
    tails = []
    while f"embedding.tails.{len(tails)}.weight" in weights:
        start = f"embedding.tails.{len(tails)}."
        tails.append((weights[start + "weight"], weights[start + "projection"]))
    head = len(weights["embedding.weight"]) - len(tails)
    firsts = np.cumsum([head, *(len(vectors) for vectors, _ in tails)])
    return [(int(n), *tail) for n, tail in zip(firsts[:-1], tails, strict=True)]


def _plain_vector(weights, token):
    """Of one token, at the input."""
    for first, vectors, projection in reversed(_plain_tails(weights)):
        if token >= first:
            return projection @ vectors[token - first]
    return weights["embedding.weight"][token]


def _plain_logits(weights, value):
    """Of all tokens after one step; log probabilities where there are tails."""
    embedding, bias = weights["embedding.weight"], weights["decoder.bias"]
    tails = _plain_tails(weights)
    if not tails:
        return embedding @ value + bias
    size, first = len(bias) - len(tails), tails[0][0]
    head = (embedding @ value + torch.cat((bias[:first], bias[size:]))).log_softmax(0)
    logs = [head[:first]]
    for number, (start, vectors, projection) in enumerate(tails):
        own = vectors @ (projection.t() @ value) + bias[start : start + len(vectors)]
        logs.append(head[first + number] + own.log_softmax(0))
    return torch.cat(logs)


def _plain_forward(weights, tokens, state):
    """Logits [time, vocabulary], features [time, size] and next state of one stream."""
    step = _lstm_step if "layers.0.hidden_weight" in weights else _qrnn_step
    logits, features = [], []
    for token in tokens:
        value, after = _plain_vector(weights, int(token)), []
        for number, before in enumerate(state):
            start = f"layers.{number}."
            own = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
            value, next_state = step(own, value, before)
            after.append(next_state)
        state = after
        features.append(value)
        logits.append(_plain_logits(weights, value))
    return torch.stack(logits), torch.stack(features), state


@pytest.fixture
def plain_forward():
    return _plain_forward


def _plain_state(model):
    like = model.embedding.weight.detach()
    if model.config.cell == "lstm":
        sizes = [(layer.hidden_weight.shape[1],) * 2 for layer in model.layers]
    else:  # the first layer sees two inputs, the others one
        cells = [layer.input_weight.shape[0] // 3 for layer in model.layers]
        sizes = [(like.shape[1], cells[0])] + [(0, size) for size in cells[1:]]
    return [(like.new_zeros(hidden), like.new_zeros(cell)) for hidden, cell in sizes]


@pytest.fixture
def plain_state():
    return _plain_state


def _plain_nats(weights, inputs, targets, state):
    """Minus log probability of each target, the features, and the next state."""
    logits, features, state = _plain_forward(weights, inputs, state)
    targets = torch.as_tensor(np.asarray(targets, dtype=np.int64))
    return -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], features, state


@pytest.fixture
def plain_nats():
    return _plain_nats


@pytest.fixture
def plain_read():
    """Reads one article: score a segment, take its gradient, update, go on."""

    def read(model, text, segment, update=None, fast_names=None, first_input=0, surprise=0.0):
        slow = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        weights, state = dict(slow), _plain_state(model)
        names = list(slow) if fast_names is None else fast_names
        inputs = [first_input, *text[:-1]]
        nats, features = [], []
        for start in range(0, len(text), segment):
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            part = slice(start, start + segment)
            costs, seen, state = _plain_nats(leaves, inputs[part], text[part], state)
            nats += costs.tolist()
            features.append(seen.detach())
            state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
            if update is None:
                continue
            weighed = sum(cost * (cost.item() / 3) ** surprise for cost in costs) / segment
            gradients = torch.autograd.grad(weighed, [leaves[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                weights[name] = update(name, weights[name], gradient, slow[name])
        return np.array(nats), torch.cat(features)

    return read


def _statistics(model):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=weight.dtype) * 0.3 + 0.01
        for name, weight in model.named_parameters()
    }


@pytest.fixture
def statistics():
    """Positive numbers in the place of the gradient statistics of a model."""
    return _statistics


def _learned_update(rule, name, weight, gradient, slow):
    key = name.replace(".", "/")
    rms = rule.get_buffer(f"rms/{key}")
    eps = rule.learned("log_eps", name).exp() * rms.mean()
    rate = rule.rate_scale * rule.learned("log_rate", name).exp()
    rate = rate / (rms + eps) ** rule.learned("exponent", name)
    decay = rule.decay_scale / (1 + (-rule.learned("decay_logit", name)).exp())
    decay = decay.clamp(max=1.0)
    return weight - rate * gradient + decay * (slow - weight)


@pytest.fixture
def learned_update():
    """The formula of LearnedRates for one tensor."""
    return _learned_update


@pytest.fixture
def learning():
    """For a way of learning: the rule, and its formula (name, weight, gradient, slow) -> weight."""

    def choose(kind, model, names=None):
        rms = {n: s for n, s in _statistics(model).items() if names is None or n in names}
        if kind == "static":
            return None, None
        if kind == "gradient descent":
            return GradientDescent(0.7, 0.05), lambda n, w, g, w0: w - 0.7 * g + 0.05 * (w0 - w)
        if kind == "rms decay":
            mean = sum(s.mean() for s in rms.values()) / len(rms)

            def krause(name, weight, gradient, slow):
                decay = (0.04 * rms[name] / mean).clamp(max=1.0)
                return weight + decay * (slow - weight) - 0.06 * gradient / (rms[name] + 0.02)

            return RmsDecay(rms, 0.06, 0.04, 0.02), krause
        rule = LearnedRates(rms, rate=0.2, decay=0.03, exponent=0.4, eps=0.8)
        with torch.no_grad():
            rule.rate_scale.fill_(0.9)
            rule.decay_scale.fill_(1.5)
            for number, parameter in enumerate(rule.parameters()):
                parameter.add_(0.1 * (number % 4) - 0.1)
        rule.requires_grad_(False)
        return rule, lambda n, w, g, w0: _learned_update(rule, n, w, g, w0)

    return choose


@pytest.fixture(scope="session")
def synthetic_text():
    """How the synthetic corpus of these tests is made."""
    return SyntheticText(
        num_names=12,
        cast_size=3,
        num_verbs=2,
        num_lines=7,
        num_articles={"train": 9, "valid": 3, "test": 4},
    )


@pytest.fixture(scope="session")
def corpus(synthetic_text, tmp_path_factory):
    """A prepared corpus: articles of 35 words, each word a token."""
    folder = tmp_path_factory.mktemp("prepared") / "synthetic"
    write(synthetic_source(synthetic_text), folder, "word", 0)
    return open_corpus(folder)


@pytest.fixture(scope="session")
def trained_run(corpus, tmp_path_factory):
    """All four trainings of a tiny experiment, never interrupted: (config, corpus, folder)."""
    sizes = {"tokens": 240, "rows": 3, "segment": 4, "unroll": 2}
    config = ExperimentConfig(
        seed=3,
        data=DataConfig(source="synthetic", tokenizer="word", held_out=0.3),
        model=ModelConfig(
            vocabulary_size=corpus.vocabulary.size,
            embedding_size=3,
            hidden_size=4,
            embedding_dropout=0.1,
            weight_dropout=0.1,
        ),
        base=BaseTrainingConfig(tokens=336, rows=4, window=7),
        rule=RuleTrainingConfig(**sizes),
        joint=JointTrainingConfig(**sizes, dropout=True),
        tuning=TuningConfig(
            articles=2,
            tokens=12,
            halvings=0,
            segments=(4,),
            rule_segments=(4,),
            thetas=(0.5, 1.0),
            shares=(0.1, 0.2),
            window=20,
            rows=2,
        ),
        evaluation=EvaluationConfig(rows=2),
    )
    folder = LanguageRunFolder(tmp_path_factory.mktemp("runs") / "unbroken")
    with pytest.MonkeyPatch.context() as patch:
        # Importing TensorBoard takes seconds; tests/training covers it.
        patch.setattr(stages, "Record", partial(Record, tensorboard=False))
        train(config, corpus, folder, stages.STAGES)
    return config, corpus, folder


@pytest.fixture
def articles():
    """Articles whose words have one to three tokens each."""
    random = np.random.default_rng(4)
    rows = []
    for number, count in enumerate((5, 2, 8)):
        words = np.repeat(np.arange(count), random.integers(1, 4, count))
        tokens = random.integers(0, 11, len(words))
        text = " ".join(f"w{n}" for n in range(count - 1)) + "\n"
        rows.append(
            {
                "title": f"article {number}",
                "text": text,
                "tokens": tokens.tolist(),
                "words": words.tolist(),
                "num_words": count,
            }
        )
    return ArticleSet(pa.Table.from_pylist(rows, schema=SCHEMA))


@pytest.fixture
def models(tiny_model, statistics):
    """A control, and a joint model with learned rates of two of its parameters."""
    model = tiny_model()
    rms = statistics(model)
    names = ("embedding.weight", "decoder.bias")
    rule = LearnedRates({name: rms[name] for name in names}, rate=0.2).requires_grad_(False)
    return TrainedModels(
        models={"control": model, "joint": tiny_model(seed=1)},
        rules={"joint": rule},
        rival_names=tuple(rms),
        statistics={4: rms},
    )


class Waiting(TorchDispatchMode):
    """Writes down what makes a processor wait for a GPU, which no graph can be captured of."""

    WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.WAITS):
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waiting(monkeypatch):
    """Watches what it surrounds, which has no use for the kernels of a processor there."""
    monkeypatch.setattr(cpu_kernels, "fits", lambda tensor: False)
    return Waiting()
