"""The arrows between the rooms, read from the imports; and no drawers."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("metalm", "data_prep")

# What each room may import of ours besides itself. A domain may hand its results to the analysis,
# which takes plain arrays and knows no domain; the domains never know each other. Language and
# few-shot learning have rooms of their own, each of which knows some of those before it.
CORE = ("metalm.meta", "metalm.training", "metalm.adapt")
_TEXT, _NETWORK, _READING, _TRAINING, _TUNING = (
    f"metalm.language.{room}" for room in ("text", "network", "reading", "training", "tuning")
)
_STATISTICS = "metalm.analysis.statistics"
_WRITING = ("metalm.analysis.plain_text", "metalm.analysis.whole_file")
ARROWS = {
    "metalm/meta": (),
    "metalm/meta/kernels": (),
    "metalm/meta/rules": ("metalm.meta",),
    "metalm/meta/layers": ("metalm.meta.kernels",),
    "metalm/training": (),
    "metalm/analysis": (),
    "metalm/analysis/statistics": ("metalm.analysis.whole_file",),
    "metalm/analysis/figures": (_STATISTICS, *_WRITING),
    "metalm/analysis/page": (
        *_WRITING,
        "metalm.analysis.tables",
        _STATISTICS,
        "metalm.analysis.figures",
    ),
    "metalm/adapt": ("metalm.meta", "metalm.training"),
    "metalm/language": ("metalm.meta", "metalm.training", "metalm.analysis", "metalm.adapt"),
    "metalm/language/text": CORE,
    "metalm/language/network": (*CORE, _TEXT),
    "metalm/language/reading": (*CORE, _TEXT, _NETWORK),
    "metalm/language/training": (*CORE, _TEXT, _NETWORK, _READING),
    "metalm/language/tuning": (*CORE, _TEXT, _NETWORK, _READING, _TRAINING),
    "metalm/language/memory": (*CORE, "metalm.analysis", _TEXT, _NETWORK, _READING),
    "metalm/language/run": (
        *CORE,
        "metalm.analysis",
        _TEXT,
        _NETWORK,
        _READING,
        _TRAINING,
        _TUNING,
    ),
    "metalm/fewshot": ("metalm.meta", "metalm.training", "metalm.analysis"),
    "metalm/fewshot/tasks": ("metalm.meta", "metalm.training"),
    "metalm/fewshot/methods": ("metalm.meta", "metalm.training", "metalm.fewshot.tasks"),
    "data_prep": (
        "metalm.language.text.articles",
        "metalm.language.text.data_config",
        "metalm.language.text.vocabulary",
        "metalm.fewshot.tasks.resize",
        "metalm.fewshot.tasks.stored_images",
        "metalm.training.disk",
    ),
}

# What these rooms may import of others; the rest is free.
PACKAGES = {
    "metalm/meta": {"torch", "triton", "numpy", "numba"},
    "metalm/training": {"torch", "safetensors", "tqdm", "filelock", "tensorboard"},
    "metalm/analysis": {"numpy", "matplotlib", "plotly", "rich"},
    "metalm/adapt": {"torch", "numpy"},
    "metalm/fewshot": {"torch", "numpy", "PIL", "tyro"},
}

# Packages that are imported under another name than they are installed by.
IMPORT_NAMES = {"markdown_it_py": "markdown_it", "pillow": "PIL"}

# What torch's builds for CUDA bring along, and nobody has to have.
OF_TORCH = {"triton"}

DRAWERS = re.compile(r"_*(utils?|helpers?|common|misc|miscellaneous|stuff)_*")


def imported(source: str) -> set[str]:
    """Every module and name that the source imports, at any depth, with dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def forbidden(room: str, source: str) -> set[str]:
    """What a file of this room imports although no arrow points there."""
    allowed = (room.replace("/", "."), *ARROWS[room])
    ours = {name for name in imported(source) if name.startswith(".") or name.split(".")[0] in OURS}
    wrong = {name for name in ours if not any(within(name, package) for package in allowed)}
    if room in PACKAGES:
        tops = {name.split(".")[0] for name in imported(source) - ours}
        wrong |= tops - PACKAGES[room] - set(sys.stdlib_module_names)
    return wrong


def room_files() -> list[tuple[str, Path]]:
    return [
        (room, path.relative_to(ROOT)) for room in ARROWS for path in (ROOT / room).rglob("*.py")
    ]


def python_files() -> list[Path]:
    folders = ("metalm", "data_prep", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [path.relative_to(ROOT) for path in [*files, *ROOT.glob("*.py")]]


@pytest.mark.parametrize(("room", "path"), room_files(), ids=str)
def test_imports_follow_the_arrows(room, path):
    assert forbidden(room, (ROOT / path).read_text(encoding="utf-8")) == set()


def test_every_room_has_its_arrows():
    patterns = ("metalm/*/*.py", "metalm/*/*/*.py")
    rooms = {path.parent for pattern in patterns for path in ROOT.glob(pattern)}
    assert {room.relative_to(ROOT).as_posix() for room in rooms} <= set(ARROWS)


@pytest.mark.parametrize(
    "source",
    [
        "import metalm.language.network.model",
        "import metalm.language as text",
        "from metalm.language.network.model import Model",
        "from metalm import language",
        "def late():\n    from metalm.language.network import model",
        "from ..language import model",
        "import data_prep",
        "import matplotlib",
        "from safetensors.torch import save_file",
    ],
)
def test_a_wrong_import_into_the_core_is_caught(source):
    assert forbidden("metalm/meta", source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("metalm/fewshot", "from metalm.language.network.model import Model"),
        ("metalm/fewshot", "from metalm import adapt"),
        ("metalm/fewshot", "from data_prep import omniglot"),
        ("metalm/fewshot", "import datasets"),
        ("metalm/language", "from metalm.fewshot.tasks.episodes import Episode"),
        ("metalm/fewshot/tasks", "from metalm.fewshot.methods.method import FewShotMethod"),
        ("metalm/language/text", "from metalm.language.network.model import LanguageModel"),
        ("metalm/language/network", "from metalm.language.reading.cache import CacheConfig"),
        ("metalm/language/run", "from metalm.language.pretrained import Pretrained"),
        ("metalm/analysis/statistics", "from metalm.analysis.figures.plots import draw"),
        ("metalm/analysis/figures", "from metalm.analysis.page.html_page import build_page"),
        ("metalm/training", "from metalm.fewshot.methods.method import FewShotMethod"),
        ("data_prep", "from metalm.fewshot.methods.method import FewShotMethod"),
    ],
)
def test_a_wrong_import_between_rooms_is_caught(room, source):
    assert forbidden(room, source)


@pytest.mark.parametrize(
    "source",
    ["import torch.nn as nn", "from metalm.meta import fork", "import math", "metalm = 'language'"],
)
def test_a_right_import_into_the_core_passes(source):
    assert forbidden("metalm/meta", source) == set()


def test_no_drawers():
    names = {part for path in python_files() for part in (*path.parts[:-1], path.stem)}
    assert {name for name in names if DRAWERS.fullmatch(name)} == set()


def test_packages_are_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["dev"]
    programs = {path for path in python_files() if path.parts[0] not in ("tests", "benchmarks")}
    for paths, lines in (
        (programs, project["dependencies"]),
        (python_files(), [*project["dependencies"], *extra]),
    ):
        declared = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in lines}
        declared = {IMPORT_NAMES.get(name, name) for name in declared}
        found = {
            name.split(".")[0]
            for path in paths
            for name in imported((ROOT / path).read_text(encoding="utf-8"))
        }
        declared |= OF_TORCH
        local = {path.stem for path in python_files()} | {*OURS, "benchmarks", ""}
        assert found - declared - local - set(sys.stdlib_module_names) == set()
