import pytest

from metalm.fewshot.tasks.splits import official_split, random_split

GROUPS = [f"b{n // 3}" for n in range(15)] + [f"e{n // 4}" for n in range(8)]
PARTS = ["background"] * 15 + ["evaluation"] * 8


def test_the_random_split_of_omniglot():
    split = random_split(1623, num_test=423, num_validation=100, seed=1)
    assert [len(part) for part in split] == [1100, 100, 423]
    assert sorted(sum(split, ())) == list(range(1623))
    assert all(list(part) == sorted(part) for part in split)
    assert split == random_split(1623, num_test=423, num_validation=100, seed=1)


def test_the_test_classes_depend_on_the_seed_alone():
    splits = [random_split(50, num_test=13, num_validation=n, seed=1) for n in (0, 5, 20)]
    assert len({split.test for split in splits}) == 1
    assert random_split(50, num_test=13, num_validation=5, seed=2).test != splits[0].test
    # Classes of the validation come from those to learn from, and nowhere else.
    assert set(splits[1].train) | set(splits[1].validation) == set(splits[0].train)


def test_the_official_split_keeps_the_evaluation_set_apart():
    split = official_split(PARTS, GROUPS, num_validation_groups=2, seed=0)
    assert split.test == tuple(range(15, 23))
    assert sorted(sum(split, ())) == list(range(23))
    alphabets = [{GROUPS[number] for number in part} for part in split]
    assert len(alphabets[1]) == 2
    assert not alphabets[0] & alphabets[1]
    assert len(split.validation) == 6


def test_the_official_split_without_validation():
    split = official_split(PARTS, GROUPS, num_validation_groups=0, seed=0)
    assert split == (tuple(range(15)), (), tuple(range(15, 23)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_split(9, num_test=5, num_validation=4, seed=0), "no class is left"),
        (lambda: random_split(9, num_test=-1, num_validation=4, seed=0), "no class is left"),
        (
            lambda: official_split(["train"] * 23, GROUPS, num_validation_groups=1, seed=0),
            "no official split; .* found train",
        ),
        (
            lambda: official_split(PARTS[1:] + PARTS[:1], GROUPS, num_validation_groups=1, seed=0),
            "official split leaks; .* found 'b4' in both|found 'e1' in both",
        ),
        (
            lambda: official_split(PARTS, GROUPS, num_validation_groups=5, seed=0),
            "expected fewer than 5 for validation, found 5",
        ),
    ],
)
def test_splits_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
