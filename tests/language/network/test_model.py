import re

import numpy as np
import pytest
import torch

from metalm.language.network import layers as layers_module
from metalm.language.network.model import LanguageModel, ModelConfig, locked_dropout
from metalm.language.network.row_linear import row_linear
from metalm.language.network.tied_embedding import look_up
from metalm.meta.parameters import call, choose, split

TIME, ROWS, VOCABULARY = 4, 3, 11
SUBSETS = (
    ("lstm", ("*",)),
    ("lstm", ("embedding.weight",)),
    ("lstm", ("decoder.bias",)),
    ("lstm", ("layers.0.hidden_weight", "layers.1.input_bias")),
    ("lstm", ("embedding.weight", "decoder.bias", "layers.1.*")),
    ("qrnn", ("*",)),
    ("qrnn", ("layers.0.input_weight",)),
    ("qrnn", ("embedding.weight", "layers.0.input_bias", "layers.1.input_weight")),
)


@pytest.fixture
def tokens():
    return torch.from_numpy(np.random.default_rng(3).integers(0, VOCABULARY, (TIME, ROWS)))


@pytest.fixture
def cotangent():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(TIME, ROWS, VOCABULARY, generator=generator, dtype=torch.float64)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_model_and_its_tied_gradient_equal_plain_autograd(
    tiny_model, tokens, cotangent, plain_forward, plain_state
):
    model = tiny_model()
    output = model(tokens, model.initial_state(ROWS))
    output.logits.backward(cotangent)
    leaves = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    assert "decoder.weight" not in leaves
    for row in range(ROWS):
        logits, features, state = plain_forward(leaves, tokens[:, row], plain_state(model))
        close(output.logits[:, row], logits)
        close(output.features[:, row], features)
        for layer, (hidden, cell) in zip(output.state, state, strict=True):
            close(layer.hidden[row], hidden)
            close(layer.cell[row], cell)
        logits.backward(cotangent[:, row])
    for name, weight in model.named_parameters():
        close(weight.grad, leaves[name].grad)


def test_tied_embedding_against_embedding_and_linear(tokens, cotangent):
    """Lookup and softmax alone: a token read many times, and tokens never read."""
    weight = torch.randn(VOCABULARY, 5, dtype=torch.float64, requires_grad=True)
    vectors, handed_on = look_up(weight, tokens)
    bias = torch.randn(VOCABULARY, dtype=torch.float64)
    (found,) = torch.autograd.grad(row_linear(vectors.tanh(), handed_on, bias), weight, cotangent)
    values = torch.nn.functional.embedding(tokens, weight).tanh()
    logits = torch.nn.functional.linear(values, weight, bias)
    close(found, torch.autograd.grad(logits, weight, cotangent)[0])


@pytest.mark.parametrize(("cell", "patterns"), SUBSETS, ids=str)
def test_weights_per_row_equal_one_model_per_row(tiny_model, tokens, cotangent, patterns):
    models = [tiny_model(seed=row) for row in range(ROWS)]
    shared = tiny_model(seed=7)
    names = choose(shared, patterns)
    fast = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in models])
        for name in names
    }
    leaves = {name: weight.requires_grad_() for name, weight in fast.items()}
    _, rest = split(shared, names)
    output = call(shared, {**rest, **leaves}, tokens, shared.initial_state(ROWS))
    output.logits.backward(cotangent)
    rest_gradients = {name: torch.zeros_like(weight) for name, weight in rest.items()}
    for row, own in enumerate(models):
        with torch.no_grad():
            for name, weight in rest.items():
                own.get_parameter(name).copy_(weight)
        expected = own(tokens[:, row : row + 1], own.initial_state(1))
        close(output.logits[:, row], expected.logits[:, 0])
        close(output.features[:, row], expected.features[:, 0])
        expected.logits.backward(cotangent[:, row : row + 1])
        for name in names:
            close(leaves[name].grad[row], own.get_parameter(name).grad)
        for name in rest:
            rest_gradients[name] += own.get_parameter(name).grad
    for name, gradient in rest_gradients.items():
        close(rest[name].grad, gradient)


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_a_text_equals_its_parts_with_the_state_passed_on(tiny_model, tokens):
    model = tiny_model(num_layers=3)
    whole = model(tokens, model.initial_state(ROWS))
    first = model(tokens[:3], model.initial_state(ROWS))
    second = model(tokens[3:], first.state)
    close(torch.cat((first.logits, second.logits)), whole.logits)


def test_state_sizes(tiny_model):
    sizes = [tuple(layer.hidden.shape) for layer in tiny_model(num_layers=3).initial_state(2)]
    assert sizes == [(2, 5), (2, 5), (2, 3)]


@pytest.mark.parametrize("cell", ["qrnn"])
def test_state_sizes_of_a_qrnn(tiny_model):
    """The first layer sees two inputs, the others one."""
    state = tiny_model(num_layers=3).initial_state(2)
    assert [tuple(layer.hidden.shape) for layer in state] == [(2, 3), (2, 0), (2, 0)]
    assert [tuple(layer.cell.shape) for layer in state] == [(2, 5), (2, 5), (2, 3)]


def test_locked_dropout_is_the_same_at_every_time_step():
    torch.manual_seed(1)
    dropped = locked_dropout(torch.ones(TIME, 30, 50, dtype=torch.float64), 0.25, True)
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.75}
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    # 1,500 draws of probability 0.25 have a standard deviation of 0.011.
    assert abs((dropped[0] == 0).double().mean() - 0.25) < 0.06


def test_locked_dropout_does_nothing_outside_of_training():
    values = torch.randn(TIME, ROWS, 5)
    assert locked_dropout(values, 0.25, False) is values
    assert locked_dropout(values, 0.0, True) is values


def first_layer_inputs(model, tokens):
    """What reaches the first layer."""
    seen = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(tokens, model.initial_state(tokens.shape[1]))
    handle.remove()
    return seen[0]


def test_embedding_dropout_drops_a_token_everywhere_in_the_batch(tiny_model):
    model = tiny_model(embedding_dropout=0.4).train()
    tokens = torch.arange(VOCABULARY).repeat(6).view(TIME + 2, -1)
    vectors = first_layer_inputs(model, tokens)
    kept = 0
    for token in range(VOCABULARY):
        found = vectors[tokens == token]
        expected = model.embedding.weight[token] / 0.6
        close(found, found[:1].expand_as(found))
        dropped = bool((found == 0).all())
        kept += not dropped
        if not dropped:
            close(found[0], expected)
    assert 0 < kept < VOCABULARY
    close(first_layer_inputs(model.eval(), tokens), model.embedding.weight[tokens])


def test_input_dropout_is_locked(tiny_model):
    model = tiny_model(input_dropout=0.5).train()
    tokens = torch.full((TIME, 7), 2)
    ratio = first_layer_inputs(model, tokens) / model.embedding.weight[2]
    assert torch.equal(ratio, ratio[:1].expand_as(ratio))
    assert set(ratio.unique().round(decimals=9).tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("per_row", [False, True])
def test_weight_dropout_thins_the_recurrent_weights_only(tiny_model, tokens, monkeypatch, per_row):
    seen = []

    def recording(inputs, state, weights):
        seen.append(weights)
        return lstm_layer(inputs, state, weights)

    lstm_layer = layers_module.lstm_layer
    monkeypatch.setattr(layers_module, "lstm_layer", recording)
    model = tiny_model(weight_dropout=0.3).train()
    parameters = dict(model.named_parameters())
    if per_row:
        parameters = {
            name: weight.expand(ROWS, *weight.shape) for name, weight in parameters.items()
        }
    call(model, parameters, tokens, model.initial_state(ROWS))
    for weights, layer in zip(seen, model.layers, strict=True):
        thinned = weights.hidden_weight.detach()
        ratio = thinned / layer.hidden_weight.detach()
        assert set(ratio.unique().round(decimals=9).tolist()) == {0.0, round(1 / 0.7, 9)}
        if per_row:
            assert torch.equal(ratio, ratio[:1].expand_as(ratio))
        close(weights.input_weight, layer.input_weight.expand_as(weights.input_weight))
    seen.clear()
    model.eval()
    model(tokens, model.initial_state(ROWS))
    assert torch.equal(seen[0].hidden_weight, model.layers[0].hidden_weight)


@pytest.mark.parametrize("cell", ["qrnn"])
def test_weight_dropout_of_a_qrnn(tiny_model, tokens, monkeypatch):
    """Its only weights are thinned, its biases not."""
    seen = []

    def recording(inputs, state, weight, bias):
        seen.append((weight.detach(), bias))
        return qrnn_layer(inputs, state, weight, bias)

    qrnn_layer = layers_module.qrnn_layer
    monkeypatch.setattr(layers_module, "qrnn_layer", recording)
    model = tiny_model(weight_dropout=0.3).train()
    model(tokens, model.initial_state(ROWS))
    for (weight, bias), layer in zip(seen, model.layers, strict=True):
        ratio = weight / layer.input_weight.detach()
        assert set(ratio.unique().round(decimals=9).tolist()) == {0.0, round(1 / 0.7, 9)}
        assert bias is layer.input_bias


def test_dropout_off_leaves_training_mode_deterministic(tiny_model, tokens):
    model = tiny_model()
    evaluated = model(tokens, model.initial_state(ROWS)).logits
    trained = model.train()(tokens, model.initial_state(ROWS)).logits
    close(evaluated, trained)


def test_training_starts_at_the_unigram_entropy(tiny_model):
    """Where the features say nothing, the loss is the cross entropy of the smoothed unigrams."""
    counts = torch.tensor([50.0, 0, 3, 17, 1, 1, 8, 2, 9, 4, 1], dtype=torch.float64)
    model = tiny_model()
    model.start_from_frequencies(counts)
    with torch.no_grad():
        model.embedding.weight.zero_()
    text = torch.repeat_interleave(torch.arange(VOCABULARY), counts.long())
    logits = model(text.unsqueeze(1), model.initial_state(1)).logits[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, text)
    total = counts.sum()
    smoothed = (counts + 1) / (total + VOCABULARY)
    close(loss, -(counts / total * smoothed.log()).sum())
    shares = counts[counts > 0] / total
    entropy = -(shares * shares.log()).sum()
    assert entropy < loss < entropy + 0.1


def test_the_forget_gate_starts_open(tiny_model):
    layer = tiny_model(hidden_size=4).layers[0]
    bias = (layer.hidden_bias.detach() - torch.tensor([0.0, 1, 0, 0]).repeat_interleave(4)).abs()
    assert bias.max() <= 1 / np.sqrt(4)


def test_the_tie_survives_a_state_dict(tiny_model):
    one, other = tiny_model(seed=1), tiny_model(seed=2)
    one.load_state_dict(other.state_dict())
    assert one.decoder.weight is one.embedding.weight
    assert torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 0},
            "model.hidden_size is too low; expected at least 1, found 0; do raise it",
        ),
        (
            {"vocabulary_size": -1},
            "model.vocabulary_size is too low; expected at least 1, found",
        ),
        (
            {"cell": "gru"},
            "unknown cell; expected one of lstm, qrnn, found 'gru'; correct model.cell",
        ),
        (
            {"input_dropout": 1.0},
            "impossible model.input_dropout; expected 0 <= input_dropout < 1",
        ),
        ({"weight_dropout": -0.1}, "impossible model.weight_dropout"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LanguageModel(ModelConfig(**changes))
