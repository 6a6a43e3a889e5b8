import math
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metalm.analysis.statistics.scores import ArticleScores, Scores


def article(title="A", words=("a", "b", "\n"), **losses):
    chosen = losses or {"static": [1.0] * len(words)}
    return ArticleScores(title=title, words=list(words), losses=chosen)


def test_perplexities_equal_loops_over_words(simulate):
    scores = simulate()
    for method in scores.methods:
        pairs = [
            list(zip(a.words, a.losses[method].tolist(), strict=True)) for a in scores.articles
        ]
        everything = [loss for words in pairs for _, loss in words]
        known = [loss for words in pairs for word, loss in words if word != "<unk>"]
        by_article = [math.fsum(loss for _, loss in words) / len(words) for words in pairs]
        assert scores.perplexity(method) == pytest.approx(
            math.exp(math.fsum(everything) / len(everything)), rel=1e-12
        )
        assert scores.perplexity_without_unknown(method) == pytest.approx(
            math.exp(math.fsum(known) / len(known)), rel=1e-12
        )
        assert scores.article_weighted_perplexity(method) == pytest.approx(
            math.exp(math.fsum(by_article) / len(by_article)), rel=1e-12
        )
        assert scores.num_unknown == len(everything) - len(known) > 0


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    words = ["x", "y", "\n", "<unk>", "z"]
    uniform = Scores(
        methods=("static",),
        articles=(article(words=words, static=np.full(5, math.log(33_278))),),
    )
    assert uniform.perplexity("static") == pytest.approx(33_278)
    assert uniform.perplexity_without_unknown("static") == pytest.approx(33_278)
    only_unknown = Scores(methods=("static",), articles=(article(words=["<unk>"]),))
    assert only_unknown.perplexity_without_unknown("static") is None


def test_an_enormous_loss_stays_finite():
    scores = Scores(methods=("static",), articles=(article(words=["a"], static=[1e5]),))
    assert math.isfinite(scores.perplexity("static"))


def test_baselines_ours_and_rivals_are_completed(simulate):
    scores = simulate()
    assert scores.baselines == {
        "static": "static",
        "dynamic evaluation": "static",
        "cache": "static",
        "metalm static": "metalm static",
        "metalm": "metalm static",
        "metalm + cache": "metalm static",
    }
    assert scores.adaptive == ("dynamic evaluation", "cache", "metalm", "metalm + cache")
    assert scores.rivals == ("static", "dynamic evaluation", "cache")
    assert scores.ours == ("metalm static", "metalm", "metalm + cache")


def test_saved_scores_come_back_exactly_and_without_pickle(simulate, tmp_path):
    scores = simulate()
    odd = ArticleScores(
        title="  = \u202e[red]\x1b[31m| \ud800 =",
        words=["é\u2028", "<unk>", "\n", ""],
        losses={m: np.linspace(0.1, 0.7, 4) for m in scores.methods},
    )
    odd_scores = Scores(
        methods=scores.methods, articles=(odd, *scores.articles), baselines=scores.baselines
    )
    path = odd_scores.save(tmp_path / "scores.reset")
    back = Scores.load(tmp_path / "scores.reset")
    assert path.name == "scores.reset.npz"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (back.methods, back.baselines, back.ours) == (
        odd_scores.methods,
        odd_scores.baselines,
        odd_scores.ours,
    )
    for restored, original in zip(back.articles, odd_scores.articles, strict=True):
        assert (restored.title, restored.words) == (original.title, original.words)
        for method in scores.methods:
            assert np.array_equal(restored.losses[method], original.losses[method])
    with zipfile.ZipFile(path) as stored:
        for name in stored.namelist():
            assert b"'O'" not in stored.read(name)[:128]


def test_truncated_and_altered_files_are_refused_by_name(simulate, tmp_path):
    path = simulate((9, 4)).save(tmp_path / "scores.npz")
    whole = path.read_bytes()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"scores\.npz cannot be read; expected"):
            Scores.load(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"scores\.npz cannot be read"):
        Scores.load(path)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "absent")


def test_saving_over_an_old_file_leaves_only_the_new_one(simulate, tmp_path):
    simulate((9, 4)).save(tmp_path / "scores.npz")
    simulate((5, 3, 2)).save(tmp_path / "scores.npz")
    assert Scores.load(Path(tmp_path) / "scores").num_words.tolist() == [5, 3, 2]


def test_bad_articles_have_their_messages():
    with pytest.raises(ValueError, match="'A' has no words; expected at least one"):
        article(words=(), static=[])
    with pytest.raises(ValueError, match=r"one number for each of 3 words, found shape \(2,\)"):
        article(static=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"'cache' in article 'A' is not finite.*nan at word 1"):
        article(cache=[1.0, math.nan, 2.0])


def test_bad_scores_have_their_messages():
    with pytest.raises(ValueError, match="scores hold no articles"):
        Scores(methods=("static",), articles=())
    with pytest.raises(ValueError, match="was scored by other methods"):
        Scores(methods=("static", "cache"), articles=(article(),))
    with pytest.raises(ValueError, match="method names must be unique"):
        Scores(methods=("static", "static"), articles=(article(),))
    with pytest.raises(ValueError, match="baseline 'static' of method 'cache' was not scored"):
        Scores(methods=("cache",), articles=(article(cache=[1.0, 2.0, 3.0]),))
    with pytest.raises(ValueError, match="ours names methods that were not scored"):
        Scores(methods=("static",), articles=(article(),), ours=("metalm",))
