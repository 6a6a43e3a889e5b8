import pytest
import torch

from metalm.language.run.opened_run import open_run
from metalm.language.run.trained import load_model


def test_an_opened_run_is_what_was_trained(trained_run):
    config, corpus, folder = trained_run
    asked = []

    def prepare(data):
        asked.append(data)
        return corpus.folder

    run = open_run(str(folder.folder), prepare)
    assert asked == [config.data]
    assert run.config == config
    assert run.corpus.vocabulary.checksum == corpus.vocabulary.checksum
    held_out = [article.title for article in run.stages.held_out_articles]
    base = [article.title for article in run.base_articles]
    assert sorted(base + held_out) == sorted(article.title for article in corpus.train)
    assert len(held_out) == round(0.3 * len(corpus.train))
    models = run.trained()
    assert models.rules.keys() == {"rule", "joint"}
    for name in ("control", "joint"):
        weights = load_model(folder, name, config).state_dict()
        for key, weight in models.models[name].state_dict().items():
            assert torch.equal(weight, weights[key])


def test_a_folder_without_a_run_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="configuration"):
        open_run(tmp_path / "nothing", lambda data: corpus.folder)


def test_a_few_shot_run_is_no_run_on_text(tmp_path, corpus):
    (tmp_path / "configuration.json").write_text('{"method": "maml", "scoring": {"tasks": 3}}')
    with pytest.raises(ValueError, match=r"is no run on text; .* found one of train.py fewshot; "):
        open_run(tmp_path, lambda data: corpus.folder)
