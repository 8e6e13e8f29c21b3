"""The package as other people get it: from a wheel, and as README says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    """Each command of README's bash blocks, without comments, continuation lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [
        line
        for line in (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines())
        if line and line[0] != "#"
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "minigen", tree / "minigen", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "-w", "dist", "."], cwd=tree, check=True)
    return next((tree / "dist").glob("*.whl"))


def test_wheel_holds_every_module(wheel):
    assert wheel.name.startswith("minigen_book-")
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if name.startswith("minigen/")}
        metadata = next(file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA"))
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "minigen").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours <= held
    assert "\nName: minigen-book\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata


def test_wheel_works_away_from_the_clone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = "import minigen, minigen.gpt; print(minigen.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_readme_python_runs(tmp_path):
    """The python blocks of README, one after the other, as one program in an empty folder."""
    assert blocks("python"), "README shows no Python"
    (tmp_path / "readme.py").write_text("\n".join(blocks("python")))
    environment = {**os.environ, "MINIGEN_PRESET": "test", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "readme.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_readme_commands_run(tmp_path):
    """Each `python -m minigen` line of README, at the smallest preset, one after the other in an empty folder."""
    environment = {**os.environ, "MINIGEN_PRESET": "test", "PYTHONPATH": str(ROOT)}
    ours = [command for command in commands() if command.startswith("python -m minigen")]
    assert ours, "README shows no command"
    for command in ours:
        command += " --quick" if " bench " in command else ""
        words = [sys.executable, *re.sub(r"--preset[ =]\S+", "--preset test", command).split(" ", 1)[1:]]
        words = [words[0], *shlex.split(" ".join(words[1:]))]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_readme_make_lines_are_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands():
        if command.startswith("make "):
            assert command.split()[1] in targets, command


def test_readme_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]+src=\"([^\"]+)\"", README):
        name = path[0] or path[1]
        assert "://" in name or (ROOT / name).is_file(), name
