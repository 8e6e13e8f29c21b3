"""Run every check, one part after another, and time them: `make test`."""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
BY_TWO = ["-n", "2", "--dist", "worksteal"]
BOOK = [sys.executable, "book/build.py"]
BROWSER = ["tests/test_book.py", "tests/test_play.py"]
DENO = str(Path(sysconfig.get_path("scripts")) / "deno")  # for JavaScript
PARTS = {
    "lint": [[sys.executable, "-m", "ruff", "check", "."],
             [DENO, "fmt", "--check", "--line-width", "88", "book/play"],
             [DENO, "lint", "book/play"]],
    "unit": [[*PYTEST, *BY_TWO, "-m", "not gpu", "tests",
              *(f"--ignore={file}" for file in BROWSER)]],
    "notebooks": [[*BOOK, "notebooks"]],  # keeps the outputs, which `book` then shows
    "book": [BOOK],
    "browser": [[*PYTEST, *BY_TWO, *BROWSER]],
    "gpu": [[*PYTEST, "-m", "gpu", "tests", *(f"--ignore={file}" for file in BROWSER)],
            [*BOOK, "notebooks"]],
}
ENVIRONMENT = {"gpu": {"MINIGEN_PRESET": "full"}}  # what a part adds to it
HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def run(name: str) -> int:
    """The exit status of the first command of a part that fails, or 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ENVIRONMENT.get(name, {})}
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL}
    if name == "gpu" and subprocess.run([sys.executable, "-c", HAS_GPU]).returncode:
        print("Skipped: this machine has no CUDA GPU.")
        return 0
    commands = (subprocess.run(command, **options) for command in PARTS[name])
    return next((done.returncode for done in commands if done.returncode), 0)


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in PARTS]:
        print(f"No part is called {', '.join(unknown)}: there are {', '.join(PARTS)}.",
              file=sys.stderr)
        return 2
    results = {}
    for name in names or PARTS:
        print(f"\n=== {name} ===", flush=True)
        start = time.time()
        results[name] = run(name), time.time() - start
    total = sum(seconds for _, seconds in results.values())
    failed = [name for name, (code, _) in results.items() if code]
    times = [f"{name} {seconds:.0f} s" for name, (_, seconds) in results.items()]
    print(f"\n{', '.join(times)}, in all {total / 60:.1f} min")
    print(f"Failed: {', '.join(failed)}." if failed
          else f"All {len(results)} parts passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
