"""Run the notebooks that changed, side by side, and build the book into _build/html: `make book`."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
JOBS = int(os.environ.get("MINIGEN_JOBS", 2))
SECONDS_PER_CELL = 600

os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "book" / "_ext"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // JOBS)))
os.environ |= {
    "TQDM_DISABLE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYTHONWARNINGS": "ignore",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import nbformat  # noqa: E402
from jupyter_cache import get_cache  # noqa: E402
from jupyter_cache.base import CacheBundleIn  # noqa: E402
from minigen_book import clean_notebook  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError  # noqa: E402


def inputs_hash() -> str:
    """Of everything a notebook's output depends on, other than the notebook itself."""
    files = [ROOT / "requirements.txt", *(ROOT / "minigen").rglob("*.py"), *(ROOT / "data").rglob("*")]
    digest = hashlib.sha256(f"{sys.version} {os.environ.get('MINIGEN_PRESET')}".encode())
    for file in sorted(file for file in files if file.is_file()):
        digest.update(file.relative_to(ROOT).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def chapters() -> list[Path]:
    import yaml

    def walk(node):
        if isinstance(node, dict):
            yield from ([node["file"]] if "file" in node else [])
            node = list(node.values())
        for child in node if isinstance(node, list) else []:
            yield from walk(child)

    names = walk(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    return [path for name in names if (path := ROOT / f"{name}.ipynb").exists()]


def run(path: Path):
    """Execute one notebook in its own folder; returns it with its outputs, or the error as a text."""
    notebook = nbformat.from_dict(clean_notebook(nbformat.read(path, as_version=4)))
    start = time.time()
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,  # the cache compares cells with their metadata
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        return path, notebook, time.time() - start, str(error)
    return path, notebook, time.time() - start, None


def run_changed() -> bool:
    stamp = BUILD / "inputs.sha256"
    fresh = inputs_hash()
    if not stamp.exists() or stamp.read_text() != fresh:
        shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    stamp.write_text(fresh)

    cache = get_cache(str(CACHE))
    changed = []
    for path in chapters():
        try:
            cache.match_cache_notebook(nbformat.from_dict(clean_notebook(nbformat.read(path, as_version=4))))
        except KeyError:
            changed.append(path)
    if not changed:
        print("No notebook changed since the last build: none is run again.", flush=True)
    good = True
    with ThreadPoolExecutor(JOBS) as pool:
        print(*(f"running {path.relative_to(ROOT)}\n" for path in changed), sep="", end="", flush=True)
        for path, notebook, seconds, error in pool.map(run, changed):
            if error:
                good = False
                print(
                    f"{path.relative_to(ROOT)} failed after {seconds:.0f} s:\n{error}",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
            print(f"{path.relative_to(ROOT)} ran in {seconds:.0f} s", flush=True)
    return good


def main() -> int:
    if not run_changed():
        return 1
    # Every page is written again: it takes seconds, changed style sheets arrive, and nothing old stays.
    shutil.rmtree(BUILD / "html", ignore_errors=True)
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        ".",
        "-W",
        "--keep-going",
        "--all",
        "-q",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return 1
    page = BUILD / "html" / "index.html"
    print(
        f"\nThe book is built: open {page}\n`make serve` shows it at an http address; `make test` checks everything."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
