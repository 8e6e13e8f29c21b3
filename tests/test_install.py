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
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands():
    """README's shell commands, without comments, continuation lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return list(filter(None, (re.sub(r"(^|\s+)#.*", "", line) for line in lines)))


def python(arguments, folder, package=ROOT):
    """Run Python in `folder`, where `package` is the folder that holds minigen."""
    own = {"MINIGEN_PRESET": "test", "PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, timeout=300,
                          env=os.environ | own, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    output = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{output}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("minigen", "data/checkpoints"):
        shutil.copytree(ROOT / name, tree / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    python(["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
            "--disable-pip-version-check", "-w", "dist", "."], tree)
    return next((tree / "dist").glob("*.whl"))


def test_wheel_holds_every_module_and_checkpoint(wheel):
    assert wheel.name.startswith("minigen_book-")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        metadata = file.read(next(name for name in held if name.endswith("/METADATA")))
    for folder, inside in (("minigen", "minigen"),
                           ("data/checkpoints", "minigen/_shipped")):
        ours = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
                for path in (ROOT / folder).rglob("*")
                if path.is_file() and "__pycache__" not in path.parts}
        assert ours <= held
    for line in (b"\nName: minigen-book\n", b"\nLicense-Expression: Apache-2.0\n"):
        assert line in metadata


def test_wheel_works_away_from_the_clone(wheel, tmp_path):
    """Installed into a folder of its own, it finds the models that ship with it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    printed = python(["-c", (
        "import minigen; model = minigen.load('imagegpt')\n"
        "image = model.generate_images(minigen.load('vq'), 1)\n"
        "print(minigen.__file__, type(model).__name__, *image.shape)")], tmp_path, site)
    path, name, *shape = printed.split()
    assert path.startswith(str(site))
    assert (name, shape[:2]) == ("ImageGPT", ["1", "3"])


@pytest.mark.parametrize("page", ["README.md", "book/experiments.md"])
def test_python_of_a_page_runs(page, tmp_path):
    """Its blocks, as one program in an empty folder."""
    found = blocks("python", (ROOT / page).read_text())
    assert found, "shows no Python"
    (tmp_path / "page.py").write_text("\n".join(found))
    python(["page.py"], tmp_path)


def test_readme_commands_run(tmp_path):
    """Each minigen line of README, at the smallest preset, in an empty folder."""
    ours = [shlex.split(command) for command in commands() if "-m minigen" in command]
    assert ours, "README shows no command"
    for program, *words in ours:
        if words[-2:] == ["--preset", "demo"] and "pixelgpt" in words:
            words += ["--steps", "1", "--val-images", "8", "--train-images", "32"]
        else:  # but the colors of a sample are those of `demo`
            words = ["test" if before == "--preset" else word
                     for before, word in zip([program, *words], words)]
        launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
        python([*launcher, *words, *["--quick"] * ("bench" in words)], tmp_path)


def test_readme_make_lines_are_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert used
    assert used <= targets


def test_readme_images_exist():
    for path in re.findall(r"(?:!\[[^\]]*\]\(|<img[^>]+src=\")([^)\s\"]+)", README):
        assert "://" in path or (ROOT / path).is_file(), path
