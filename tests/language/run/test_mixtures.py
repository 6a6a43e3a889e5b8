import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from metalm.language.reading.cache import CacheConfig
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.methods import Method
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.language.reading.store import ReadingStore
from metalm.language.run.mixtures import kept_mixtures, run_mixtures
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.scoring import score_split
from metalm.language.run.trial_files import weights_of
from metalm.language.tuning.tuning_text import TuningConfig

CONFIG = TuningConfig(articles=2, tokens=6)
ALONE = Method(
    name="two, learned mixture",
    model="joint",
    learning="joint",
    segment=3,
    settings={"rate_scale": 1.0, "decay_scale": 0.5},
    multiples=(2.0, 0.5),
    learned_mixture=True,
)
CACHED = ALONE.with_(name="two, learned mixture + cache", cache=CacheConfig(window=6))
ONE = ALONE.with_(
    name="one + learned cache",
    multiples=(1.0,),
    cache=CacheConfig(window=6),
)
STATIC = Method(name="static", model="control", learning="none", segment=64)


@pytest.fixture
def folder(tmp_path):
    return LanguageRunFolder(tmp_path / "run")


def test_networks_are_kept_and_used_again(models, articles, folder):
    told = []
    methods = [STATIC, ALONE, CACHED]
    found = run_mixtures(models, methods, articles, CONFIG, "reset", folder, told.append)
    assert told == [*found] == [ALONE.name, CACHED.name]
    again = run_mixtures(models, methods, articles, CONFIG, "reset", folder, told.append)
    kept, _ = kept_mixtures(folder, "reset", weights_of(models))
    for name, network in found.items():
        for other in (again, kept):
            for key, value in network.state_dict().items():
                assert torch.equal(value, other[name].state_dict()[key])
    assert len(told) == 2
    changed = [ALONE.with_(settings={"rate_scale": 1.5, "decay_scale": 0.5}), CACHED, ONE]
    more = run_mixtures(models, changed, articles, CONFIG, "reset", folder, told.append)
    assert told[2:] == [ALONE.name, ONE.name]  # what was there for the others stays
    assert [*more] == [method.name for method in changed]
    for key, value in found[CACHED.name].state_dict().items():
        assert torch.equal(value, more[CACHED.name].state_dict()[key])
    fewer = run_mixtures(models, [ONE], articles, CONFIG, "reset", folder, told.append)
    assert [*fewer] == [ONE.name]
    assert len(told) == 4
    assert run_mixtures(models, [STATIC], articles, CONFIG, "carry", folder) == {}
    assert kept_mixtures(folder, "carry", weights_of(models)) is None


def test_a_damaged_file_is_named(models, articles, folder):
    run_mixtures(models, [ALONE], articles, CONFIG, "reset", folder)
    path = folder.weights("mixtures-reset")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"mixtures-reset.safetensors is truncated or altered"):
        kept_mixtures(folder, "reset", weights_of(models))


def test_networks_of_other_weights_are_trained_anew(models, articles, folder):
    told = []
    run_mixtures(models, [ALONE], articles, CONFIG, "reset", folder, told.append)
    model = copy.deepcopy(models.models["control"])
    with torch.no_grad():
        model.decoder.bias[0] += 1.0
    others = replace(models, models={**models.models, "control": model})
    run_mixtures(others, [ALONE], articles, CONFIG, "reset", folder, told.append)
    run_mixtures(others, [ALONE], articles, CONFIG, "reset", folder, told.append)
    assert told == [ALONE.name] * 2


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_scores_are_those_of_the_networks(models, articles, folder, tmp_path, mode):
    methods = [STATIC, ALONE, CACHED, ONE]
    mixtures = run_mixtures(models, methods, articles, CONFIG, mode, folder)
    scored = score_split(models, methods, articles, mode, ReadingStore(tmp_path), mixtures=mixtures)
    texts = [article.tokens for article in articles]
    if mode == "carry":
        texts = [np.concatenate(texts)]
    for method in methods[1:]:
        grid = None if method.cache is None else CacheGrid(thetas=(0.66,), window=6)
        copies = [
            Reader(
                models.model(copy),
                models.rule(copy),
                models.fast_names(copy),
                3,
                grid,
                confidence=True,
            ).read(texts)
            for copy in method.copies()
        ]
        theta = None if grid is None else 0
        nats = nats_of_copies(copies, theta, 0.13 if grid else 0.0, mixtures[method.name])
        expected = np.concatenate(nats).sum()
        found = scored.scores.nats(method.name).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        plain = replace(method, learned_mixture=False)
        assert plain.copies() == method.copies()
