import numpy as np
import pytest
import torch

from metalm.fewshot.tasks.episodes import EpisodeSampler
from metalm.fewshot.tasks.images import ImageEpisodes, LabelledImages

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 2, 5, 5), dtype=np.uint8)
LABELS = np.array([1, 0, 2, 1, 0, 2, 2])


def images(**changes):
    extra = {"groups": ["x", "y", "x"], "parts": ["p", "p", "q"]} | changes
    return LabelledImages(PICTURES, LABELS, ["a", "b", "c"], **extra)


def test_inputs_are_the_pictures_with_ink_one():
    items = torch.tensor([[3, 0, 6], [1, 1, 2]])
    found = images().inputs(items)
    assert found.dtype == torch.float32
    for row in range(2):
        for column in range(3):
            expected = PICTURES[items[row, column]].astype(np.float32) / 255
            np.testing.assert_allclose(found[row, column].numpy(), expected, rtol=1e-6)


def test_rotations_are_classes_of_their_own():
    rotated = images().with_rotations()
    assert len(rotated) == 28
    assert rotated.names == (
        *("a rot000", "b rot000", "c rot000"),
        *("a rot090", "b rot090", "c rot090"),
        *("a rot180", "b rot180", "c rot180"),
        *("a rot270", "b rot270", "c rot270"),
    )
    assert rotated.groups[4] == "y rot090"
    assert rotated.parts[5] == "q"
    for item in range(28):
        quarter, row = divmod(item, 7)
        expected = np.rot90(PICTURES[row], quarter, (1, 2)).astype(np.float32) / 255
        found = rotated.inputs(torch.tensor([item]))[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert rotated.labels[item] == LABELS[row] + 3 * quarter


def test_four_quarter_turns_come_back():
    turned = images().with_rotations().of_classes([3]).with_rotations()
    again = turned.of_classes([3])  # 90 + 270 degrees
    item = int(np.flatnonzero(again.labels == 0)[0])
    expected = images().of_classes([0]).inputs(torch.tensor([item]))
    assert torch.equal(again.inputs(torch.tensor([item])), expected)


def test_the_pictures_are_not_turned_themselves():
    before = PICTURES.copy()
    images().with_rotations().inputs(torch.arange(28))
    np.testing.assert_array_equal(PICTURES, before)


def test_chosen_classes_are_numbered_anew():
    chosen = images().of_classes([2, 0])
    assert (chosen.names, chosen.groups, chosen.parts) == (("c", "a"), ("x", "x"), ("q", "p"))
    assert chosen.labels.tolist() == [1, 0, 1, 0, 0]
    expected = PICTURES[[1, 2, 4, 5, 6]].astype(np.float32) / 255
    np.testing.assert_allclose(chosen.inputs(torch.arange(5)).numpy(), expected, rtol=1e-6)


def test_episodes_hold_the_pictures_of_their_items():
    data = images()
    plan = EpisodeSampler(data.labels, 2, 1, 1, 5).sample(4)
    source = ImageEpisodes(data, EpisodeSampler(data.labels, 2, 1, 1, 5))
    episode = source.sample(4)
    assert episode.support_inputs.shape == (4, 2, 2, 5, 5)
    assert torch.equal(episode.query_inputs, data.inputs(plan.query_items))
    assert torch.equal(episode.query_targets, plan.query_targets)
    # It can be resumed like its sampler.
    state = source.state_dict()
    expected = source.sample(1)
    source.sample(3)
    source.load_state_dict(state)
    assert torch.equal(source.sample(1).support_inputs, expected.support_inputs)


class Unreadable(np.ndarray):
    """Pictures that must not be looked at."""

    def __getitem__(self, key):
        raise AssertionError("a picture was read")


def test_sampling_reads_labels_alone():
    data = LabelledImages(PICTURES.view(Unreadable), LABELS, ["a", "b", "c"])
    source = ImageEpisodes(data.with_rotations(), EpisodeSampler(data.labels, 2, 1, 1, 5))
    source.sampler.sample(3)
    with pytest.raises(AssertionError, match="a picture was read"):
        source.sample(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: images().of_classes([0, 0]), "expected each at most once"),
        (lambda: images().of_classes([]), "at least one"),
        (lambda: images().of_classes([3]), r"expected numbers in \[0, 3\), found 3 to 3"),
        (lambda: images(groups=["x"]), "groups do not fit the classes; expected 3, found 1"),
        (lambda: images(parts=["x"] * 4), "parts do not fit the classes; expected 3, found 4"),
        (
            lambda: LabelledImages(PICTURES / 255, LABELS, ["a", "b", "c"]),
            r"expected uint8 \[rows, channels, height, width\], found float64",
        ),
        (
            lambda: LabelledImages(PICTURES, LABELS[:6], ["a", "b", "c"]),
            "labels do not fit the pictures; expected 7, found 6",
        ),
        (
            lambda: LabelledImages(PICTURES, LABELS, ["a", "b", "c", "d"]),
            "expected every class from 0 to 3 to have pictures, found 3 classes",
        ),
        (
            lambda: LabelledImages(PICTURES[..., :4], LABELS, ["a", "b", "c"]).with_rotations(),
            "expected squares, found 5 x 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()
