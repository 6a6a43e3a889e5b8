import json

import pytest

from metalm.fewshot.comparison import compare, described, table, tasks_of
from metalm.fewshot.experiment import Result
from metalm.fewshot.scoring import Estimate

FACTS = {
    "method": "one",
    "task": "glyphs",
    "way": 5,
    "shot": 1,
    "query": 15,
    "split": "random",
    "rotations": True,
    "turned_tests": False,
    "within_groups": False,
    "batch_normalisation": "running",
    "updates": None,
    "seed": 3,
    "steps": 2000,
}


def results(**changes):
    return {
        "one": Result(Estimate(0.875, 0.01, 200), FACTS),
        "two": Result(Estimate(0.5, 0.02, 200), FACTS | {"method": "two", "steps": 7} | changes),
    }


def test_table_and_files_hold_the_same_numbers(tmp_path):
    path = compare(results(batch_normalisation="transductive"), tmp_path / "new")
    found = json.loads(path.read_text())
    assert found["tasks"]["tasks"] == 200
    assert found["methods"]["one"]["mean"] == 0.875
    assert found["methods"]["two"]["batch_normalisation"] == "transductive"
    assert {p.name for p in path.parent.iterdir()} == {"results.json", "scores.png", "scores.svg"}
    lines = table(results()).splitlines()
    assert lines[0] == (
        "glyphs, 5-way 1-shot, 15 queries a class, random split, rotations learnt from; 200 test "
        "tasks, seed 3"
    )
    assert lines[-2:] == [
        "| one | 87.50 ± 1.00 | - | running | 2,000 |",
        "| two | 50.00 ± 2.00 | - | running | 7 |",
    ]


def curves(updates, after):
    """Made up: the error of a method falls with every update."""
    facts = FACTS | {"task": "sine", "shot": 5, "updates": updates}
    found = {number: Estimate(0.67 / (1 + number), 0.05, 100) for number in (*after, updates)}
    return Result(found[updates], facts, {number: found[number] for number in after})


def test_curves_are_scored_by_their_error(tmp_path):
    """After the updates that a method makes in use, and after others where it was scored there."""
    found = {"maml": curves(9, (0, 1)), "meta-sgd": curves(1, (0,)), "pixels": curves(0, ())}
    assert described(tasks_of(found)) == "sine curves, 5 points, 15 queries; 100 test tasks, seed 3"
    facts = tasks_of(found) | {"task": "linear"}
    assert described(facts).startswith("straight lines, 5 points, 15 queries; 100 test tasks")
    lines = table(found).splitlines()
    assert lines[2].startswith("| method | mean squared error (95 %) | updates | after 0 | after 1")
    assert lines[4].startswith("| maml | 0.067 ± 0.050 | 9 | 0.670 ± 0.050 | 0.335 ± 0.050 |")
    assert lines[5].startswith("| meta-sgd | 0.335 ± 0.050 | 1 | 0.670 ± 0.050 | - |")
    assert lines[6].startswith("| pixels | 0.670 ± 0.050 | 0 | - | - |")
    stored = json.loads(compare(found, tmp_path).read_text())["methods"]
    assert stored["maml"]["after"] == {
        "0": {"mean": 0.67, "margin": 0.05},
        "1": {"mean": 0.335, "margin": 0.05},
    }
    assert stored["maml"]["updates"] == 9


def test_other_tasks_are_not_compared():
    with pytest.raises(ValueError, match="on different tasks; expected shot = 1, found 5"):
        table(results(shot=5))
