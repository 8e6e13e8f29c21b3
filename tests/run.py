"""Run every check, one part after the other, and say how long each took: `make test`."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
PARTS = {
    "lint": [sys.executable, "-m", "ruff", "check", "."],
    "unit": [*PYTEST, "-n", "2", "--dist", "worksteal", "tests", "--ignore", "tests/test_book.py"],
    "notebooks": [*PYTEST, "-n", "2", "--nbmake", "--nbmake-timeout=600", "nbs"],
    "book": [sys.executable, "book/build.py"],
    "browser": [*PYTEST, "tests/test_book.py"],
}
# What a part adds to the environment.  The notebooks run here at their smallest, and again at `demo` in the book.
ENVIRONMENT = {
    "notebooks": {"MINIGEN_PRESET": "test", "TQDM_DISABLE": "1", "JUPYTER_PREFER_ENV_PATH": "1"},
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"No part is called {', '.join(unknown)}: there are {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    results = []
    for name in names or PARTS:
        print(f"\n=== {name} ===", flush=True)
        start = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **ENVIRONMENT.get(name, {})}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        code = subprocess.run(PARTS[name], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode
        results.append((name, code, time.time() - start))
    total = sum(seconds for *_, seconds in results)
    failed = [name for name, code, _ in results if code]
    print(
        "\n"
        + ", ".join(f"{name} {seconds:.0f} s" for name, _, seconds in results)
        + f", in all {total / 60:.1f} min"
    )
    print(f"Failed: {', '.join(failed)}." if failed else f"All {len(results)} parts passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
