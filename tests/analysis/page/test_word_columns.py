import base64
import json
import zlib

import numpy as np
import pytest

from metalm.analysis import ArticleScores, Scores
from metalm.analysis.page.word_columns import STEPS, arrange, fits, in_steps, most_telling, pack

PLENTY = 10**9


def number_at(content: bytes, array: int, place: int, num_arrays: int, num_words: int) -> int:
    """One number of a block, put together from its three bytes, which lie a plane apart."""
    plane = num_arrays * num_words
    return sum(content[p * plane + array * num_words + place] << 8 * p for p in range(3))


def read_back(packed, arranged, text: int):
    """Words and losses of a text, one number after the other: slow, unlike how they were packed."""
    vocabulary = json.loads(zlib.decompress(base64.b64decode(packed.vocabulary)))
    content = zlib.decompress(base64.b64decode(packed.blocks[text]))
    numbers = sorted(arranged.texts[text].losses)
    count, arrays = arranged.texts[text].article.num_words, len(numbers) + 1
    assert len(content) == 3 * arrays * count
    words = [vocabulary[number_at(content, 0, i, arrays, count)] for i in range(count)]
    losses = {}
    for array, number in enumerate(numbers, 1):
        losses[number] = []
        for i in range(count):
            folded = number_at(content, array, i, arrays, count)
            own = -(folded + 1) // 2 if folded % 2 else folded // 2
            parent = arranged.columns[number].parent
            losses[number].append(own + (0 if parent < 0 else losses[parent][i]))
    return words, {n: [value * packed.step for value in own] for n, own in losses.items()}


def check_all(packed, arranged, scores):
    for mode, places in arranged.places.items():
        for article, text in zip(scores[mode].articles, places, strict=True):
            words, losses = read_back(packed, arranged, text)
            assert words == list(article.words)
            for number, column in enumerate(arranged.columns):
                if column.mode == mode:
                    wrong = np.abs(np.array(losses[number]) - article.losses[column.method])
                    assert wrong.max() <= packed.step / 2 + 1e-9


def test_words_and_losses_come_back_within_half_a_step(simulate):
    scores = {"reset": simulate((70, 13, 31)), "carry": simulate((70, 13, 31), seed=3)}
    arranged = arrange(scores)
    assert len(arranged.texts) == 3  # both modes read the same
    packed = pack(arranged, PLENTY)
    assert packed.step == STEPS[0]
    check_all(packed, arranged, scores)


def test_modes_may_read_different_articles_and_the_same_one_twice(simulate):
    first, other = simulate((40, 9, 17)), simulate((23,), seed=8)
    again = Scores(
        methods=other.methods,
        articles=(first.articles[1], *other.articles, first.articles[1]),
        baselines=other.baselines,
    )
    scores = {"reset": first, "carry": again}
    arranged = arrange(scores)
    assert arranged.places == {"reset": (0, 1, 2), "carry": (1, 3, 4)}
    check_all(pack(arranged, PLENTY), arranged, scores)


def test_large_losses_and_any_words_survive():
    words = ["\n", "</script>", "\u2028", "\ud800", "", "a b", "日本", "\x00"]
    losses = {"static": np.array([0, 1e-9, 5e3, 2, 3, 4, 700, 6.0]), "metalm": np.arange(8.0) * 311}
    scores = {
        "m": Scores(
            methods=tuple(losses), articles=(ArticleScores(title="A", words=words, losses=losses),)
        )
    }
    arranged = arrange(scores)
    check_all(pack(arranged, PLENTY), arranged, scores)


def test_a_column_is_taken_from_the_one_it_resembles():
    """ "near" is "far" but for a tenth of the words; "far" has nothing to do with "static"."""
    random = np.random.default_rng(5)
    static, far = random.gamma(2, 2, 4000), random.gamma(2, 2, 4000)
    near = far + (random.random(4000) < 0.1)
    losses = {"static": static, "far": far, "near": near}
    article = ArticleScores(title="A", words=["w"] * 4000, losses=losses)
    arranged = arrange({"reset": Scores(methods=tuple(losses), articles=(article,))})
    assert [column.parent for column in arranged.columns] == [-1, -1, 1]


def test_less_room_means_coarser_steps_and_then_fewer_texts(simulate):
    scores = {"reset": simulate((400, 300, 350))}
    arranged = arrange(scores)
    sizes = []
    for room in (PLENTY, 9000, 6500, 4500):
        packed = pack(arranged, room)
        sizes.append((packed.step, sum(block != "" for block in packed.blocks)))
        assert len(packed.vocabulary) + sum(map(len, packed.blocks)) <= room
        if all(packed.blocks):
            check_all(packed, arranged, scores)
        assert fits(arranged, room) == all(packed.blocks)
    steps, kept = zip(*sizes, strict=True)
    assert list(steps) == sorted(steps)
    assert steps[0] < steps[1]
    assert kept[0] == 3
    assert 0 < kept[-1] < 3
    assert packed.step == STEPS[-1]


def test_the_most_telling_methods_are_kept(simulate):
    scores = simulate((200, 100))
    assert most_telling(scores, 6) == scores.methods
    # The best of ours, its own baseline, and the best rival, in the order of the methods.
    assert most_telling(scores, 3) == ("dynamic evaluation", "metalm static", "metalm + cache")
    assert {c.method for c in arrange({"m": scores}, 3).columns} == set(most_telling(scores, 3))


@pytest.mark.parametrize(("loss", "step", "steps"), [(1.26, 0.5, 3), (-0.34, 0.2, -2), (0, 0.1, 0)])
def test_steps_are_the_nearest(loss, step, steps):
    assert in_steps(np.array([loss]), step).tolist() == [steps]
