"""Notebooks and package say the same, and every module stands on its own."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "minigen").rglob("*.py")
    if path.stem != "__main__"
)
SKIP = {".git", ".venv", "_build", "build", "__pycache__", ".pytest_cache", ".ruff_cache", "runs", "shared"}


def project_files():
    """What belongs to the project, with or without git at hand."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in SKIP and not name.endswith(".egg-info")]
        yield from (Path(folder) / name for name in files)


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A copy of the tree in which the notebooks were exported and cleaned again."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for folder in ("nbs", "minigen"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("nbdev-export", "nbdev-clean"):
        program = Path(sys.executable).with_name(name)
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run([str(program)], cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return tree


def test_package_is_what_the_notebooks_export(exported):
    ours = {path.relative_to(ROOT) for path in (ROOT / "minigen").rglob("*.py")}
    theirs = {path.relative_to(exported) for path in (exported / "minigen").rglob("*.py")}
    assert theirs == ours, "run `make export`"
    differ = [
        str(path) for path in sorted(ours) if not filecmp.cmp(ROOT / path, exported / path, shallow=False)
    ]
    assert differ == [], "run `make export`; edit the notebook, not the module"


def test_every_exported_module_has_its_notebook():
    for path in (ROOT / "minigen").rglob("*.py"):
        if source := re.search(r"File to edit: \S*?(nbs/\S+\.ipynb)", path.read_text()):
            assert (ROOT / source[1]).is_file(), f"{path.name} comes from {source[1]}, which is gone"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(exported, path):
    assert filecmp.cmp(path, exported / "nbs" / path.name, shallow=False), "run `make export`"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, (
            "run `make export`: outputs stay out"
        )
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_a_chapter(path):
    assert f"nbs/{path.stem}" in (ROOT / "_toc.yml").read_text(), "name the chapter in _toc.yml"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_in_a_fresh_process(module):
    done = python(f"import {module}", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_name_is_undefined():
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "F821",
        "--no-cache",
        "minigen",
        "nbs",
        "tests",
        "book",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert not any(re.match(r"\s*-|.*://", line) for line in lines), "only versions, no addresses"
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(requirement.specifier).startswith("==") for requirement in found)
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def test_requirements_satisfy_the_package():
    import tomllib

    pins = pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        need = Requirement(line)
        pin = next(iter(pins[need.name.lower().replace("_", "-")].specifier)).version
        assert need.specifier.contains(pin), f"{need} is not met by {pin}"


def test_requirements_are_what_runs():
    for name, requirement in pinned().items():
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(name).split("+")[0]), (
                f"{requirement}, but {version(name)} runs"
            )


def test_the_repository_is_named_once_in_each_place():
    for name in ("pyproject.toml", "_config.yml"):
        assert (ROOT / name).read_text().count("github.com/minigen-book/minigen") == 1, name


def test_no_large_file():
    large = [str(path) for path in project_files() if path.stat().st_size > 8 * 2**20]
    assert large == [], "larger than 8 MiB"


def test_nobody_is_sent_to_another_package():
    # The name minigen on the public package index is somebody else's.
    wrong = re.compile(r"pip[\d.]* install\s+(?:-\S+\s+)*[\"']?minigen(?![-\w/])")
    texts = {".md", ".py", ".ipynb", ".toml", ".yml", ".txt", ".cff"}
    named = [
        str(path)
        for path in project_files()
        if path.suffix in texts and wrong.search(path.read_text(errors="ignore"))
    ]
    assert named == []


def test_every_notebook_begins_alike_on_colab():
    """The cell that fetches package and data has the address of pyproject.toml and runs before any import."""
    address = re.search(r'^Homepage = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    cells = [next(c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code") for path in NOTEBOOKS]
    first = {"".join(cell["source"]) for cell in cells}
    assert len(first) == 1 and f"git clone -q --depth 1 {address}\n" in first.pop()
    assert all(cell["metadata"].get("tags") == ["remove-cell"] for cell in cells)
