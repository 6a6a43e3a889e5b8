import json
import re

import numpy as np
import pytest
from PIL import Image

from data_prep.picture_corpora import prepare_pictures
from metalm.fewshot import command_line, experiment
from metalm.fewshot.command_line import evaluate, parse, run
from metalm.fewshot.method_names import made, names_of_methods
from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.images import LabelledImages
from metalm.training.folder_lock import only_program_in
from metalm.training.run_folder import RunFolder
from metalm.training.state import pack


def nothing(*arguments, **options):
    raise AssertionError("no pictures are prepared")


def test_overrides_reach_every_method():
    asked = parse(
        ["--method", "maml", "pixels", "--way", "7", "--adaptation.order", "1", "--seed", "4"]
    )
    assert [config.method for config in asked.configs] == ["maml", "pixels"]
    for config in asked.configs:
        assert (config.task.way, config.adaptation.order, config.seed) == (7, 1, 4)
    assert str(asked.folder) == "runs/glyphs-7-way-1-shot"
    asked = parse(["--task", "sine", "--method", "all"])
    assert [config.method for config in asked.configs] == names_of_methods("sine")
    assert {config.task.shot for config in asked.configs} == {5}
    assert "posterior-mean" not in names_of_methods("sine")
    asked = parse(["--task", "linear", "--method", "all"])
    assert [config.method for config in asked.configs][-1] == "posterior-mean"
    assert str(asked.folder) == "runs/linear-5-shot"
    assert str(parse(["--run", "here"]).folder) == "here"


def test_unknown_names_are_answered_with_the_known_ones(capsys):
    with pytest.raises(ValueError, match=r"expected one of maml, .*, or all, found 'relation'"):
        parse(["--task", "sine", "--method", "relation"])
    with pytest.raises(SystemExit):
        parse(["--adaptation.ordr", "1"])
    assert "ordr" in capsys.readouterr().err


def test_the_help_names_every_method_and_the_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(["--help"])
    options = capsys.readouterr().out.partition("Any setting")[0]
    assert max(map(len, options.splitlines())) <= 80
    said = " ".join(options.split())
    named = re.search(r"one or several of ([^()]*), or all \(default: ([a-z]*)\)", said)
    assert sorted(named[1].split(", ")) == [
        "anil", "from-scratch", "lstm-meta-learner", "maml", "matching", "meta-sgd", "multi-task",
        "pixels", "posterior-mean", "prototypical", "prototypical-elastic", "relation", "reptile",
        "siamese-contrastive", "siamese-pairs", "siamese-triplet", "snail", "transfer",
    ]  # fmt: skip
    assert [config.method for config in parse([]).configs] == [named[2]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task sine --method maml --training.tasks 0", "training.tasks is too low; expected"),
        ("--method maml --adaptation.together -1", "adaptation.together is too low; expected at"),
        ("--method prototypical --network.width 0", "network.width is too low; expected at least"),
        ("--method reptile --adaptation.steps 0", "without one it learns nothing; expected at"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(words.split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err.replace("│", " ").replace("|", " ")
    assert message in " ".join(said.split())


def test_a_dry_run_prints_the_settings_and_writes_nothing(tmp_path, capsys):
    assert run(["--dry-run", "--run", str(tmp_path / "run")], nothing) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["method"] == "prototypical"
    assert not (tmp_path / "run").exists()


def test_curves_have_no_ways():
    with pytest.raises(ValueError, match="expected no --way for 'sine', found 3; leave it out"):
        parse(["--task", "sine", "--method", "maml", "--way", "3"])


def test_from_the_command_line_to_the_table(tmp_path, capsys):
    arguments = [
        "--method",
        "pixels",
        "prototypical",
        "--training.steps",
        "2",
        "--training.way",
        "5",
    ]
    arguments += ["--network.width", "4", "--scoring.tasks", "4", "--run", str(tmp_path)]
    assert run(arguments, nothing) == 0
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["methods"]) == ["pixels", "prototypical"]
    steps = {name: method["steps"] for name, method in found["methods"].items()}
    assert steps == {"pixels": 0, "prototypical": 2}
    with pytest.raises(ValueError, match=r"pass one of those in it \(pixels, prototypical\)"):
        evaluate(RunFolder(tmp_path), nothing)
    assert "| prototypical |" in first
    assert run(arguments, nothing) == 0  # nothing is trained again, and the scores are the same
    assert capsys.readouterr().out == first
    folder = RunFolder(tmp_path / "prototypical")
    *_, row, picture = evaluate(folder, nothing).splitlines()
    assert row in first.splitlines()
    assert picture == f"picture: {tmp_path / 'prototypical' / 'episode.png'}"


@pytest.fixture
def few_glyphs(monkeypatch):
    """Hundred glyphs in place of thousand."""

    def draw(size=28):
        return draw_glyphs(alphabets=4, letters=25, drawings=16, seed=0, size=size)

    monkeypatch.setattr(command_line, "draw_pictures", draw)


def test_glyphs_have_the_size_that_was_asked_for():
    (config,) = parse(["--task.size", "17"]).configs
    images = command_line.pictures_of(config, nothing)
    assert images.shape == (1, 17, 17)
    assert images.num_classes == 1000
    # Drawn anew and not shrunk: the first of them, in a call of its own.
    first = draw_glyphs(alphabets=1, letters=1, drawings=20, seed=0, size=17)
    np.testing.assert_array_equal(images.pictures[:20], first.pictures)


@pytest.mark.usefixtures("few_glyphs")
def test_one_program_at_a_time_in_each_folder(tmp_path):
    arguments = ["--method", "pixels", "--scoring.tasks", "2", "--run", str(tmp_path / "out")]
    arguments += ["--task.validation-share", "0.1"]
    with only_program_in(tmp_path / "out"), pytest.raises(ValueError, match="out is in use"):
        run(arguments, nothing)
    assert not (tmp_path / "out" / "results.json").exists()
    assert run(arguments, nothing) == 0
    folder = RunFolder(tmp_path / "out" / "pixels")
    before = {path: path.read_bytes() for path in folder.folder.iterdir()}
    with only_program_in(folder.folder):
        for challenge in (None, challenge_in(tmp_path / "runs")):
            with pytest.raises(ValueError, match=r"out.pixels is in use; .* found process \d+"):
                evaluate(folder, nothing, challenge)
    assert {path: path.read_bytes() for path in folder.folder.iterdir()} == before


def challenge_in(folder):
    """Two runs of pictures that are all alike within a class."""
    random = np.random.default_rng(0)
    for run_name in ("run01", "run02"):
        place = folder / run_name
        lines = []
        for kind in ("training", "test"):
            (place / kind).mkdir(parents=True)
        for number in range(1, 21):
            blocks = random.random((7, 7)) > 0.15  # ink is black
            picture = Image.fromarray(np.kron(blocks, np.ones((15, 15), bool)))
            picture.save(place / "training" / f"class{number:02}.png")
            picture.save(place / "test" / f"item{number:02}.png")
            lines.append(f"test/item{number:02}.png training/class{number:02}.png")
        (place / "class_labels.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_the_official_challenge_from_a_folder(tmp_path):
    """The nearest pixels are never wrong."""
    challenge_in(tmp_path / "runs")
    arguments = ["--method", "pixels", "--scoring.tasks", "2", "--run", str(tmp_path / "out")]
    assert run(arguments, nothing) == 0
    folder = RunFolder(tmp_path / "out" / "pixels")
    found = evaluate(folder, nothing, tmp_path / "runs")
    assert found.splitlines() == [
        "run01: 0.0 %",
        "run02: 0.0 %",
        "mean error of 2 runs: 0.0 %",
        "batch normalisation: none",
    ]
    assert json.loads((folder.folder / "official-runs.json").read_text())["mean"] == 0.0
    by_hausdorff = evaluate(None, nothing, tmp_path / "runs")
    assert by_hausdorff.splitlines() == found.splitlines()[:-1]  # equal pictures have distance 0
    with pytest.raises(ValueError, match=r"run01, run02, \.\.\. without a gap .*, found none"):
        evaluate(folder, nothing, tmp_path)


def own_pictures(folder, classes=20, pictures=16):
    """Class folders of dark strokes on white, 28 x 28 pixels, in colours."""
    drawn = draw_glyphs(alphabets=1, letters=classes, drawings=pictures, seed=3)
    for number, ink in zip(drawn.labels, drawn.pictures[:, 0], strict=True):
        place = folder / f"class {number:02}"
        place.mkdir(parents=True, exist_ok=True)
        name = f"{len(list(place.iterdir())):02}.png"
        Image.fromarray(255 - np.stack([ink] * 3, -1)).save(place / name)
    return drawn


def test_few_classes_of_own_pictures(tmp_path, monkeypatch, capsys):
    """Twenty: 5 for the test, 5 to choose on, 10 to learn from, 40 with those that are turned."""
    own_pictures(tmp_path / "own", pictures=17)
    monkeypatch.setattr(experiment, "VALIDATION_TASKS", 2)
    words = ["--task", str(tmp_path / "own"), "--root", str(tmp_path / "data")]
    words += ["--task.channels", "1", "--run", str(tmp_path), "--training.steps", "1"]
    words += ["--network.width", "2", "--scoring.tasks", "2", "--task.query", "2"]
    with pytest.raises(ValueError, match=r"found 1 \(1 of 20\); raise .* from 0\.06 to 0\.25"):
        run(words, prepare_pictures)
    words += ["--task.validation-share", "0.25"]
    with pytest.raises(ValueError, match=r"60-way episodes, found 40 .* lower --training\.way"):
        run([*words, "--training.way=60"], prepare_pictures)
    assert not (tmp_path / "prototypical" / "configuration.json").exists()
    assert run(words, prepare_pictures) == 0
    assert "prototypical: trained 40-way and not 60-way, as there are" in capsys.readouterr().out
    written = RunFolder(tmp_path / "prototypical").read_configuration()
    assert written["training"]["way"] == 40
    assert run(words, prepare_pictures) == 0  # the same run


def test_scans_of_dark_ink_are_read_right_and_take_the_challenge(tmp_path):
    drawn = own_pictures(tmp_path / "scans")
    words = ["--task", str(tmp_path / "scans"), "--root", str(tmp_path / "data")]
    words += ["--method", "pixels", "--task.channels", "1", "--task.dark-ink"]
    (config,) = parse(words).configs
    images = command_line.pictures_of(config, prepare_pictures)
    np.testing.assert_array_equal(images.pictures, drawn.pictures)
    challenge = challenge_in(tmp_path / "runs")
    for name, given in (("grey", words), ("colours", words[:-3])):
        folder = RunFolder(tmp_path / name)
        folder.write_configuration(parse(given).configs[0])
        if name == "grey":
            found = evaluate(folder, prepare_pictures, challenge)
            assert found.splitlines()[-2] == "mean error of 2 runs: 0.0 %"
        else:
            with pytest.raises(ValueError, match=r"pictures of one channel, .*--task\.channels 1"):
                evaluate(folder, prepare_pictures, challenge)


@pytest.mark.usefixtures("few_glyphs")
@pytest.mark.parametrize("method", ["from-scratch", "snail", "transfer"])
def test_the_official_challenge_needs_its_ways(method, tmp_path):
    challenge = challenge_in(tmp_path / "runs")
    answered = []
    for ways in ("19", "20"):
        words = ["--method", method, "--way", ways, "--network.width", "2"]
        (config,) = parse([*words, "--adaptation.test-steps", "1"]).configs
        folder = RunFolder(tmp_path / ways)
        folder.write_configuration(config)
        as_at_the_start = made(config, command_line.draw_pictures())
        folder.save("method", *pack(as_at_the_start.state_dict()))
        try:
            answered.append(evaluate(folder, nothing, challenge).splitlines()[-2])
        except ValueError as error:
            answered.append(str(error))
        assert (folder.folder / "official-runs.json").exists() == (ways == "20")
    assert answered[0].endswith("expected 20 ways, found 19; train one with --way 20")
    assert answered[1].startswith("mean error of 2 runs")


@pytest.mark.parametrize("method", ["pixels", "prototypical"])
def test_the_official_challenge_is_not_for_a_run_that_may_have_learnt_from_it(
    method, tmp_path, monkeypatch
):
    """Pictures in two sets, as Omniglot's, from the second of which the challenge is."""
    drawn = draw_glyphs(alphabets=4, letters=25, drawings=16, seed=0)
    parts = ["background" if number < 75 else "evaluation" for number in range(100)]
    images = LabelledImages(
        drawn.pictures, drawn.labels, drawn.names, groups=drawn.groups, parts=parts
    )
    monkeypatch.setattr(command_line, "draw_pictures", lambda size: images)
    challenge = challenge_in(tmp_path / "runs")
    folders = {}
    for split in ("random", "official"):
        words = ["--method", method, "--network.width", "2", "--task.split", split]
        (config,) = parse([*words, "--task.validation-groups", "1"]).configs
        folder = folders[split] = RunFolder(tmp_path / split)
        folder.write_configuration(config)
        folder.save("method", *pack(made(config, images).state_dict()))
    why = r"may have learnt from; .* at random .*--task\.split random\); .*--task\.split official"
    with pytest.raises(ValueError, match=why):
        evaluate(folders["random"], nothing, challenge)
    assert not (folders["random"].folder / "official-runs.json").exists()
    assert "mean error of 2 runs" in evaluate(folders["official"], nothing, challenge)
    assert (folders["official"].folder / "official-runs.json").exists()
