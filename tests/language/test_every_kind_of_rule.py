"""The kinds of rules in the trainings, the evaluation, and the saved models."""

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from metalm.language import ship
from metalm.language.network.model import LanguageModel
from metalm.language.network.segment_loss import SegmentLoss
from metalm.language.pretrained import Pretrained
from metalm.language.reading.reader import Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.run import experiment
from metalm.language.run import stages as stages_module
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import score_split
from metalm.language.run.stages import Stages
from metalm.language.run.trained import load_trained
from metalm.language.text.article_batches import ArticleRows
from metalm.language.training.meta_training import MetaTraining
from metalm.language.training.meta_training_config import (
    JointTrainingConfig,
    RuleTrainingConfig,
    empty_rule,
    starting_rule,
)
from metalm.meta.parameters import split
from metalm.meta.tree import tensors
from metalm.meta.unroll import unroll
from metalm.training import loop
from metalm.training.record import Record

of_both_cells = pytest.mark.parametrize("cell", ["lstm", "qrnn"])
KINDS = ("gated", "lstm", "momentum")
NAMES = ("embedding.weight", "layers.1.input_weight", "layers.1.input_bias", "decoder.bias")
SEGMENT = 3


def busy_rule(statistics, model, kind):
    """A rule of this kind whose network has something to say, and whose steps are large."""
    rms = {name: statistics(model)[name] for name in NAMES}
    rule = starting_rule(rms, RuleTrainingConfig(kind=kind))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in rule.named_parameters():
            if not name.startswith("rates."):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.5 * drawn)
        rule.rate_scale.fill_(300.0)
        rule.decay_scale.fill_(50.0)
    return rule


@of_both_cells
@pytest.mark.parametrize("kind", KINDS)
def test_articles_read_in_rows_are_as_if_read_alone(tiny_model, texts, statistics, kind):
    """Rows leave and others enter: each article has a state of its own, fresh at its start."""
    model = tiny_model()
    reader = Reader(model, busy_rule(statistics, model, kind), NAMES, SEGMENT)
    alone = [reader.read([text], 1).nats[0] for text in texts]
    static = Reader(model, segment=SEGMENT).read(texts, 1).nats
    together = reader.read(texts, 3)
    assert sum(together.fallbacks) == 0
    for number, nats in enumerate(alone):
        np.testing.assert_allclose(together.nats[number], nats, rtol=1e-9)
    assert np.abs(alone[2] - static[2]).max() > 0.01


@of_both_cells
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True])
def test_a_trainings_rows_are_where_reading_alone_would_be(
    tiny_model, article_set, statistics, kind, joint
):
    """Learning rates of zero: fast weights and states of every row follow from its article."""
    random = np.random.default_rng(3)
    lengths = (12, 24, 6, 18)
    articles = article_set([random.integers(0, 11, n).astype(np.int32) for n in lengths])
    model = tiny_model()
    rule = busy_rule(statistics, model, kind)
    sizes = {"rows": 3, "segment": SEGMENT, "unroll": 2, "learning_rate": 0.0}
    training = MetaTraining(
        model,
        rule,
        NAMES,
        articles,
        (JointTrainingConfig(dropout=False, **sizes) if joint else RuleTrainingConfig(**sizes)),
        lambda index: 1.0,
        6,
        torch.optim.SGD(model.parameters(), lr=0.0) if joint else None,
        (lambda index: 0.0) if joint else None,
    )
    slow, rest = split(model, NAMES)
    for index in range(6):
        training.step(index)
        for row, (number, position) in enumerate(training.passes.rows.positions):
            alone = ArticleRows([articles[number].tokens], iter([0]), 1)
            alone.enter()
            batches = [alone.take(SEGMENT) for _ in range(position // SEGMENT)]
            state, loss = model.initial_state(1), SegmentLoss(model, SEGMENT)
            read = unroll(loss, rule, slow, rest, batches, state, rows=1, order=0)
            for name, weight in read.fast.items():
                torch.testing.assert_close(training.fast[name][row], weight[0])
            carried = zip(tensors(training.rule_state), tensors(read.rule_state), strict=True)
            for found, expected in carried:
                torch.testing.assert_close(found[row], expected[0])
    assert training.passes.state_dict()["entered"] > 5


@pytest.fixture(scope="module", params=KINDS)
def kind_run(request, trained_run, tmp_path_factory):
    """The run of the other tests, its rule of another kind: (config, corpus, folder)."""
    config, corpus, other = trained_run
    config = dataclasses.replace(config, rule=dataclasses.replace(config.rule, kind=request.param))
    folder = LanguageRunFolder(tmp_path_factory.mktemp("kinds") / "run")
    folder.folder.mkdir()
    for name in ("base", "control"):
        shutil.copy(other.weights(name), folder.weights(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "Record", partial(Record, tensorboard=False))
        experiment.train(config, corpus, folder, ["rule", "joint"])
    experiment.tune_run(config, corpus, folder, ["reset"])
    return config, corpus, folder


def test_what_lies_above_the_rates_is_trained_too(kind_run):
    """Some have nothing to do here: an LSTM for rows where no tensor is large, and a keep that
    unrolls of two updates cannot see.
    """
    config, _, folder = kind_run
    start = empty_rule(LanguageModel(config.model), config.rule)
    before = {
        name: value
        for name, value in start.named_parameters()
        if not name.startswith(("rates.", "of_rows.", "keep_logit/"))
    }
    rule, joint = (folder.load(name)[0] for name in ("rule", "joint"))
    assert before
    for name, value in before.items():
        assert rule[f"rule.{name}"].shape == value.shape
        assert not torch.equal(rule[f"rule.{name}"], joint[f"rule.{name}"])


@pytest.mark.parametrize("name", ["rule", "joint"])
def test_a_stopped_training_goes_on_to_the_same_bits(kind_run, tmp_path, monkeypatch, name):
    """Stopped in the middle of articles."""
    config, corpus, unbroken = kind_run
    folder = LanguageRunFolder(tmp_path / "run")
    folder.folder.mkdir()
    for before in ("base", *(("rule",) if name == "joint" else ())):
        shutil.copy(unbroken.weights(before), folder.weights(before))

    def run(training, *, num_steps, **options):
        loop.run(training, num_steps=5, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "run", run)
        with pytest.raises(KeyboardInterrupt):
            Stages(config, corpus, folder).train(name)
    Stages(config, corpus, folder).train(name)
    expected, found = unbroken.load(name), folder.load(name)
    assert found[1] == expected[1]
    for key, tensor in expected[0].items():
        assert torch.equal(tensor, found[0][key]), key


def test_evaluated_saved_and_loaded(kind_run, tmp_path):
    config, corpus, folder = kind_run
    models = load_trained(folder, config, None)
    trials = experiment.read_trials(folder, "reset")
    assert {"joint", "rule"} <= trials.keys()
    scored = experiment.score(config, models, trials, corpus.test, folder, "test", "reset")
    assert np.isfinite(scored.scores.nats("metalm")).all()
    model = ship.pretrained_of(folder)
    assert f"--rule.kind {config.rule.kind}" in model.config.origin.command
    model.save_pretrained(tmp_path / "saved")
    loaded = Pretrained.from_pretrained(tmp_path / "saved")
    assert type(loaded.rule) is type(models.rules["joint"])
    expected = model.rule.state_dict()
    for name, tensor in loaded.rule.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    again = score_split(
        loaded.trained_models(), loaded.methods(), corpus.test, "reset", ReadingStore(tmp_path)
    )
    np.testing.assert_allclose(again.scores.nats("metalm"), scored.scores.nats("metalm"), rtol=1e-4)
    tokens = corpus.test[0].tokens
    nats = loaded.reader().read(tokens).nats
    first = again.scores.articles[0].losses["metalm"]
    np.testing.assert_allclose(np.bincount(corpus.test[0].words, nats), first, rtol=1e-4)
    ship.ship(model, tmp_path / "shipped", torch.bfloat16, 0)
    rounded = Pretrained.from_pretrained(tmp_path / "shipped").reader().read(tokens).nats
    np.testing.assert_allclose(rounded, nats, rtol=0.08)


def test_a_run_from_before_there_were_kinds(trained_run, tmp_path, monkeypatch):
    config, corpus, other = trained_run
    shutil.copytree(other.folder, tmp_path / "run")
    folder = LanguageRunFolder(tmp_path / "run")
    stored = folder.read_configuration()
    for name in ("kind", "hidden", "sees"):
        del stored["rule"][name]
    folder.configuration_path.write_text(json.dumps(stored))
    monkeypatch.setattr(stages_module, "run", None)  # nothing is trained again
    experiment.train(config, corpus, folder, stages_module.STAGES)
    changed = dataclasses.replace(config, rule=dataclasses.replace(config.rule, kind="gated"))
    with pytest.raises(ValueError, match=r"other values for rule\.kind; choose another folder"):
        experiment.train(changed, corpus, folder, ["rule"])


def test_a_joint_training_that_no_rule_of_that_kind_has(trained_run, tmp_path):
    config, corpus, _ = trained_run
    config = dataclasses.replace(
        config,
        rule=dataclasses.replace(config.rule, kind="gated"),
        joint=dataclasses.replace(config.joint, mode="forward"),
    )
    folder = LanguageRunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"AbstractStepRule, found Gated; do use mode='reverse'"):
        experiment.train(config, corpus, folder, ["base", "control", "rule", "joint"])
    assert not folder.folder.exists()
