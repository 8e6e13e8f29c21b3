"""Run the chapters and build the book into _build/html: `make book`.

Notebooks run through nbmake, as tests, and only those that changed. Their outputs go
into the cache that Jupyter Book reads; `python book/build.py notebooks` stops there.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
JOBS = int(os.environ.get("MINIGEN_JOBS", 2))
SECONDS_PER_CELL = 600
# measured for each notebook, two at a time on two cores, to estimate the time left
SECONDS = {"00_images_as_sequences": 20, "01_pixel_gpt": 377, "02_training": 124,
           "03_patchgpt": 147, "04_vq_tokenizer": 148, "05_imagegpt": 132,
           "06_measuring": 157, "07_maskgit": 293, "08_next_patch_prediction": 129,
           "09_any_to_any": 119, "10_diffusion_decoder": 150, "11_comparison": 15,
           "appendix_data": 13, "appendix_runs": 43}

os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "_ext")]
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // JOBS)))
os.environ |= {
    "TQDM_DISABLE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYTHONWARNINGS": "ignore",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")])),
}

import nbformat  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402
from jupyter_cache import get_cache  # noqa: E402
from jupyter_cache.base import CacheBundleIn  # noqa: E402
from minigen_book import clean_notebook  # noqa: E402

from minigen.devices import pick_preset  # noqa: E402


def inputs_hash() -> str:
    """A hash of what the outputs of every notebook depend on."""
    files = [ROOT / "requirements.txt", *(ROOT / "minigen").rglob("*.py"),
             *(ROOT / "data").rglob("*")]
    digest = hashlib.sha256(f"{sys.version} {pick_preset()}".encode())
    for file in sorted(file for file in files if file.is_file()):
        digest.update(file.relative_to(ROOT).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def chapters() -> list[Path]:
    """The notebooks that _toc.yml names."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    files = [ROOT / f"{chapter['file']}.ipynb"
             for part in parts for chapter in part["chapters"]]
    return [file for file in files if file.exists()]


def time_left(names: list[str], done: list[str], elapsed: float) -> str:
    """How long the remaining notebooks will take, as text.

    `SECONDS` says how the time is divided among the notebooks; the speed of this
    machine follows from `elapsed`, the seconds since the first one began.
    """
    shares = {name: SECONDS.get(name.partition(".")[0], 60) for name in names}
    finished = sum(shares[name] for name in done)
    left = sum(shares.values()) - finished
    seconds = elapsed * left / finished if finished else left / JOBS
    about = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    return f"{len(done)} of {len(names)} notebooks have run; about {about} left"


class Keep:
    """A pytest plugin that caches each notebook that ran without errors."""

    def __init__(self, cache, folder: Path, notebooks: dict):
        self.cache, self.folder, self.notebooks = cache, folder, notebooks
        self.done, self.start = [], time.time()

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        name = Path(report.nodeid.split("::")[0]).name
        self.done.append(name)
        left = time_left(list(self.notebooks), self.done, time.time() - self.start)
        print(f"\n{left}", flush=True)
        if not report.passed:
            return
        executed = nbformat.read(self.folder / name, as_version=4)
        notebook = deepcopy(self.notebooks[name])
        for cell, done in zip(notebook.cells, executed.cells, strict=True):
            if cell.cell_type == "code":  # only outputs: times in metadata differ
                cell.outputs, cell.execution_count = done.outputs, done.execution_count
        bundle = CacheBundleIn(notebook, str(ROOT / "nbs" / name),
                               data={"execution_seconds": report.duration})
        self.cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def run_changed() -> int:
    """Run the notebooks whose outputs are not in the cache; pytest's exit status."""
    stamp, fresh = BUILD / "inputs.sha256", inputs_hash()
    if not stamp.exists() or stamp.read_text() != fresh:
        shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    stamp.write_text(fresh)
    cache, changed = get_cache(str(CACHE)), {}
    for path in chapters():
        notebook = nbformat.read(path, as_version=4)
        notebook = nbformat.from_dict(clean_notebook(notebook))
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            changed[path.name] = notebook
    if not changed:
        print("No notebook changed since it last ran: none is run again.", flush=True)
        return 0
    # nbmake ignores folders called _build, so it runs copies in another folder.
    with tempfile.TemporaryDirectory(prefix="minigen-book-") as scratch:
        folder = Path(scratch) / "nbs"
        folder.mkdir()
        for name in ("data", "book"):  # notebooks may name them as ../data and ../book
            (Path(scratch) / name).symlink_to(ROOT / name)
        for name, notebook in changed.items():
            nbformat.write(notebook, folder / name)
        print(f"Running {', '.join(changed)}.\n{time_left(list(changed), [], 0)}, on "
              "two cores as fast as ours. Later builds run only what changed.",
              flush=True)
        return pytest.main(
            ["-c", "pyproject.toml", "-p", "no:cacheprovider", "-v", "--durations=0",
             "-n", str(JOBS), "--dist", "worksteal", "--nbmake", "--overwrite",
             f"--nbmake-timeout={SECONDS_PER_CELL}", str(folder)],
            plugins=[Keep(cache, folder, changed)])


def add_player() -> None:
    """Copy what book/play.md needs beside its page: code, models, mean colors."""
    import torch

    import minigen
    from minigen.checkpoints import find_checkpoint
    from minigen.runs import shipped

    target = BUILD / "html" / "book" / "play"
    shutil.copytree(ROOT / "book" / "play", target)
    models = {"pixelgpt": "pixelgpt"} | {
        f"{chapter}-{count}": shipped(chapter, f"tokens{count}")
        for chapter in ("vq", "imagegpt", "maskgit") for count in (64, 256)}
    for name, checkpoint in models.items():
        shutil.copytree(find_checkpoint(checkpoint), target / "models" / name)
        if name.startswith("vq"):
            tokenizer = minigen.load(checkpoint)
            tokens = torch.arange(tokenizer.codebook_size).view(-1, 1, 1)
            squares = tokenizer.decode(tokens.expand(-1, 2, 2))  # 2 x 2 equal tokens
            colors = (squares.mean(dim=(2, 3)) * 255).round().int().tolist()
            (target / "models" / name / "colors.json").write_text(json.dumps(colors))


def build_pages() -> int:
    """Write all pages anew, so that no old one stays; return the exit status."""
    print("Writing the pages, which takes about a minute.", flush=True)
    shutil.rmtree(BUILD / "html", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", "from jupyter_book.cli.main import main; main()",
         "build", ".", "-W", "--keep-going", "--all", "-q"],
        stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return 1
    add_player()
    print(f"\nThe book is built: open {BUILD / 'html' / 'index.html'}\n"
          "`make serve` shows it at an http address; `make test` checks everything.")
    return 0


if __name__ == "__main__":
    status = run_changed()
    if not status and sys.argv[1:] != ["notebooks"]:
        status = build_pages()
    sys.exit(status)
