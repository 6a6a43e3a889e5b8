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


def test_curves_are_scored_by_their_error():
    found = {"maml": Result(Estimate(0.67, 0.05, 100), FACTS | {"task": "sine", "shot": 5})}
    assert described(tasks_of(found)) == "sine curves, 5 points, 15 queries; 100 test tasks, seed 3"
    assert "| method | mean squared error (95 %)" in table(found)
    assert "| maml | 0.670 ± 0.050 | - |" in table(found)


def test_other_tasks_are_not_compared():
    with pytest.raises(ValueError, match="on different tasks; expected shot = 1, found 5"):
        table(results(shot=5))
