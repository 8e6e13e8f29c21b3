"""Notebooks and package say the same, and every module stands on its own."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "minigen").rglob("*.py"))
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__")
           for path in FILES if path.stem != "__main__"]
SKIP = {".git", ".venv", "_build", "build", "__pycache__", ".pytest_cache",
        ".ruff_cache", "runs", "shared"}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def project_files():
    """What belongs to the project, with or without git at hand."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders
                      if name not in SKIP and not name.endswith(".egg-info")]
        yield from (Path(folder) / name for name in files)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A copy of the tree in which the notebooks were exported and cleaned again."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for folder in ("nbs", "minigen"):
        shutil.copytree(ROOT / folder, tree / folder,
                        ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([str(Path(sys.executable).with_name(name))], cwd=tree,
                              env=os.environ | {"PYTHONPATH": str(tree)},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return tree


def test_package_is_what_the_notebooks_export(exported):
    theirs = sorted(path.relative_to(exported)
                    for path in (exported / "minigen").rglob("*.py"))
    assert theirs == FILES, "run `make export`"
    differ = [str(path) for path in FILES
              if not filecmp.cmp(ROOT / path, exported / path, shallow=False)]
    assert differ == [], "run `make export`; edit the notebook, not the module"
    for path in FILES:
        source = re.search(r"to edit: \S*?(nbs/\S+\.ipynb)", (ROOT / path).read_text())
        assert not source or (ROOT / source[1]).is_file(), f"{path}: no {source[1]}"


@each_notebook
def test_notebook_is_clean(exported, path):
    same = filecmp.cmp(path, exported / "nbs" / path.name, shallow=False)
    assert same, "run `make export`"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        outputs = cell.get("outputs") or cell.get("execution_count")
        assert not outputs, "run `make export`: outputs stay out"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def visible(notebook):
    """The cells of a chapter, and whether a reader sees their source unfolded."""
    for cell in notebook["cells"]:
        tags = set(cell["metadata"].get("tags", ()))
        if "remove-cell" not in tags:
            yield cell, "".join(cell["source"]), "hide-input" not in tags


@each_notebook
def test_code_comes_in_pieces_and_prose_before_it(path):
    before = "code"
    for cell, source, shown in visible(json.loads(path.read_text())):
        kind = cell["cell_type"]
        first = source[:60]
        assert kind == "markdown" or before == "markdown", f"no prose before: {first}"
        if kind == "code" and shown:
            assert source.count("\n") <= 50, f"a wall, fold it or cut it: {first}"
        before = kind


@each_notebook
def test_reading_takes_as_long_as_stated(path):
    # 180 words, or 15 lines of the code that is not folded, a minute
    minutes, text = 0.0, ""
    for cell, source, shown in visible(json.loads(path.read_text())):
        if cell["cell_type"] == "markdown":
            text += source
            minutes += len(re.findall(r"[A-Za-z]\S*", source)) / 180
        elif shown:
            minutes += sum(map(bool, source.splitlines())) / 15
    stated = int(re.search(r"Reading takes about (\d+) minutes", text)[1])
    assert abs(stated - minutes) <= 5 + 0.1 * minutes, f"{minutes:.0f} minutes"


@each_notebook
def test_notebook_is_a_chapter(path):
    toc = (ROOT / "_toc.yml").read_text()
    assert f"nbs/{path.stem}\n" in toc, "name the chapter in _toc.yml"


def test_every_module_can_be_the_first_that_is_imported():
    """No import of another module has to come before it; libraries stay loaded."""
    program = """
import importlib, sys
for name in sys.argv[1:]:
    print(name)
    for loaded in [each for each in sys.modules if each.split(".")[0] == "minigen"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program, *MODULES], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.split()[-1] + done.stderr
    assert done.stdout.split() == MODULES


def pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    addresses = [line for line in lines if re.match(r"\s*-|.*://", line)]
    assert not addresses, "only versions, no addresses"
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(requirement.specifier).startswith("==") for requirement in found)
    return {pin.name.lower().replace("_", "-"): pin for pin in found}


def test_requirements_satisfy_the_package():
    pins = pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = sum(project["optional-dependencies"].values(), [])
    for need in map(Requirement, [*project["dependencies"], *optional]):
        pin = next(iter(pins[need.name.lower().replace("_", "-")].specifier)).version
        assert need.specifier.contains(pin), f"{need} is not met by {pin}"


def test_requirements_are_what_runs():
    for name, pin in pinned().items():
        if pin.marker is None or pin.marker.evaluate():
            runs = version(name).split("+")[0]
            assert pin.specifier.contains(runs), f"{pin}, but {runs} runs"


def test_the_repository_is_named_once_in_each_file():
    for name in ("pyproject.toml", "_config.yml"):
        assert (ROOT / name).read_text().count("github.com/minigen-book/minigen") == 1


def test_no_large_file():
    large = [str(path) for path in project_files() if path.stat().st_size > 8 * 2**20]
    assert large == [], "larger than 8 MiB"


def test_nobody_is_sent_to_another_package():
    # The name minigen on the public package index is somebody else's.
    wrong = re.compile(r"pip[\d.]* install\s+(?:-\S+\s+)*[\"']?minigen(?![-\w/])")
    texts = {".md", ".py", ".ipynb", ".toml", ".yml", ".txt", ".cff"}
    named = [str(path) for path in project_files() if path.suffix in texts
             and wrong.search(path.read_text(errors="ignore"))]
    assert named == []


def test_every_notebook_begins_alike_on_colab():
    """The first cell fetches package and data from the project's address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cells = [next(cell for cell in json.loads(path.read_text())["cells"]
                  if cell["cell_type"] == "code") for path in NOTEBOOKS]
    (first,) = {"".join(cell["source"]) for cell in cells}
    assert f"git clone -q --depth 1 {project['urls']['Homepage']}\n" in first
    assert all(cell["metadata"].get("tags") == ["remove-cell"] for cell in cells)
