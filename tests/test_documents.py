"""What the documents name exists; the README's commands are those that the checks run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "EXPERIMENTS.md")
EXAMPLE, TESTS = "sh run_example.sh", "sh run_tests.sh"
# Written by the programs, so not in the tree.
WRITTEN = ("runs/", "data/", ".venv/", "report.md", "metrics.jsonl", "results.json", "tuning-")
SKIPPED = {".venv", ".git", "runs", "data", "build", "dist", "node_modules", ".pytest_cache"}


def tree() -> set[str]:
    """Every file and folder of the project, folders with a slash at the end."""
    found, todo = set(), [ROOT]
    while todo:
        for path in todo.pop().iterdir():
            if path.name in SKIPPED or (path.name.startswith(".") and path.name != ".ci"):
                continue
            found.add(path.relative_to(ROOT).as_posix() + "/" * path.is_dir())
            if path.is_dir():
                todo.append(path)
    return found


def documents() -> list[str]:
    return sorted({name for name in tree() if name.endswith(".md")} | set(REQUIRED))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The code blocks, fenced and indented."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"(?<=\n\n)(?: {4}.*\n)+", text)]


def named_paths(text: str) -> set[str]:
    """Words in code type that look like a file with an ending we use, or a folder with a slash."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    words = {word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split()}
    looks = re.compile(r"(?:[\w.-]+/)*(?:[\w-]+\.(?:py|sh|md|toml|txt|json)|[\w.-]+/)")
    paths = {word for word in words if looks.fullmatch(word)}
    return {path for path in paths if not path.startswith(WRITTEN)}


def links(text: str) -> set[str]:
    """Targets of links and pictures inside the project."""
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    return {target for target in targets if not re.match(r"[a-z]+:", target)}


@pytest.mark.parametrize("name", REQUIRED)
def test_the_document_is_there(name):
    assert len(read(name).split()) > 20


@pytest.mark.parametrize("name", documents())
def test_every_path_it_names_exists(name):
    known = tree()
    folder = Path(name).parent

    def exists(path: str) -> bool:
        inside = (folder / path).as_posix() + "/" * path.endswith("/")
        return path in known or inside in known or any(k.endswith("/" + path) for k in known)

    assert {path for path in named_paths(read(name)) if not exists(path)} == set()


@pytest.mark.parametrize("name", documents())
def test_every_link_leads_somewhere(name):
    folder = (ROOT / name).parent
    assert {target for target in links(read(name)) if not (folder / target).exists()} == set()


@pytest.mark.parametrize("name", documents())
def test_every_program_it_calls_exists(name):
    text = read(name)
    code = "\n".join([*blocks(text), *re.findall(r"`([^`\n]+)`", text)])
    scripts = re.findall(r"\b(?:python3?|sh)\s+([\w./-]+\.(?:py|sh))\b", code)
    modules = re.findall(r"\bpython3?\s+-m\s+([\w.]+)", code)
    ours = [module for module in modules if module.split(".")[0] in ("data_prep", "metalm")]
    packages = [Path(*module.split(".")) for module in ours]
    assert {script for script in scripts if not (ROOT / script).is_file()} == set()
    assert {
        str(package)
        for package in packages
        if not ((ROOT / package / "__main__.py").is_file() or (ROOT / f"{package}.py").is_file())
    } == set()


def rooms_tables(text: str) -> dict[str, set[str]]:
    """Folder of each table of files -> the words in code type of its rows.

    The folder stands in the table's first cell ("file of `metalm/adapt/`") or in the heading above.
    """
    found: dict[str, set[str]] = {}
    folder = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = re.match(r"#+ (metalm/\w+)", line)
            folder = f"{heading[1]}/" if heading else ""
        elif head := re.match(r"\| file of `([\w/]+/)`", line):
            folder = head[1]
        elif folder and line.startswith("|"):
            found.setdefault(folder, set()).update(re.findall(r"`([^`]+)`", line))
    return found


def unnamed(modules: set[str], text: str) -> set[str]:
    """Modules that no table of their room names: by file, by stem, or by a folder of theirs."""
    tables = rooms_tables(text)

    def named(module: str) -> bool:
        return any(
            module.startswith(folder)
            and {
                module.removeprefix(folder),
                module.removeprefix(folder).removesuffix(".py"),
                module.removeprefix(folder).rpartition("/")[0] + "/",
            }
            & words
            for folder, words in tables.items()
        )

    return {module for module in modules if not named(module)}


def test_the_architecture_names_every_module():
    modules = {name for name in tree() if re.fullmatch(r"(metalm/\w+|data_prep)/.*[^_]\.py", name)}
    assert "metalm/meta/rules/adam.py" in modules
    assert unnamed(modules, read("ARCHITECTURE.md")) == set()


def test_a_module_is_named_in_the_table_of_its_own_room():
    text = "\n".join(
        [
            "## metalm/one: first",
            "| file | idea |",
            "|---|---|",
            "| `a.py`, one file a method | `b`; `deep/` |",
            "## The rest",
            "| stage | `e.py` |",
            "| file of `two/` | idea |",
            "| `c.py` | not in code type: d.py |",
        ]
    )
    modules = {"metalm/one/a.py", "metalm/one/b.py", "metalm/one/deep/x.py", "two/c.py"}
    assert unnamed(modules, text) == set()
    others = {"metalm/one/c.py", "two/a.py", "two/d.py", "two/deep/x.py", "two/e.py"}
    assert unnamed(others, text) == others


def test_the_readme_gives_the_two_commands_on_lines_of_their_own():
    lines = [
        line.split("#")[0].strip()
        for block in blocks(read("README.md"))
        for line in block.splitlines()
    ]
    assert EXAMPLE in lines
    assert TESTS in lines


def test_the_check_runs_the_readmes_test_command():
    lines = [line.strip() for line in read(".ci/run").splitlines()]
    assert TESTS in lines


def test_both_commands_use_the_constraints_and_the_same_set_up():
    assert "--constraint constraints.txt" in read("set_up.sh")
    assert "sh set_up.sh\n" in read("run_example.sh")
    assert "sh set_up.sh dev\n" in read("run_tests.sh")


def test_every_requirement_has_a_tested_version_inside_its_range():
    tomllib = pytest.importorskip("tomllib")
    requirements = pytest.importorskip("packaging.requirements")
    lines = [line.split("#")[0].strip() for line in read("constraints.txt").splitlines()]
    pins = [requirements.Requirement(line) for line in lines if line]
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        asked = requirements.Requirement(text)
        versions = [
            specifier.version
            for pin in pins
            if pin.name.lower() == asked.name.lower()
            for specifier in pin.specifier
        ]
        assert versions, f"{asked.name} has no line in constraints.txt"
        assert all(asked.specifier.contains(version) for version in versions)


def test_the_licence_is_the_one_that_the_project_names():
    assert "Apache-2.0" in read("pyproject.toml")
    assert "Version 2.0, January 2004" in read("LICENSE")
    assert "END OF TERMS AND CONDITIONS" in read("LICENSE")
