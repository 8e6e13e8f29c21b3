"""Benchmarks: `python -m minigen bench [NAME ...]`.

Each module has `rows(quick) -> list[Row]`. Speeds are compared by ratios within one
run: of medians over repetitions that alternate, so that a machine that slows down slows
both sides. If other processes used more than a tenth of the processors during a
repetition, it is repeated, up to three times.
"""

import argparse
import importlib
import json
import os
import pkgutil
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil
import torch

from minigen.devices import hardware
from minigen.runs import describe_run

BUSY = 0.1  # share of the processors that others may use during a repetition
# mostly of quality, and slow: they run only if named
LONG = ("blocks", "comparison", "decoders", "generator", "joint", "masking", "networks",
        "pixels", "schedules", "steps", "steps256", "sweep")
RETRIES = 3  # how often a disturbed repetition is repeated


@dataclass
class Row:
    """One line of the table."""

    case: str
    value: float
    unit: str  # x: a ratio
    target: float | None = None  # None: no target; `note` may say why
    at_least: bool = True  # whether the target is a lower bound, or else an upper one
    note: str = ""  # "no target: this processor has no bf16 instructions"

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def seconds(function: Callable[[], object], repeat: int = 1) -> tuple[float, bool]:
    """Mean seconds of `repeat` calls, and whether the machine was otherwise idle."""
    process = psutil.Process()

    def busy() -> float:
        times, own = psutil.cpu_times(), process.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0)
        return sum(times) - idle - own.user - own.system

    others, start = busy(), time.perf_counter()
    for _ in range(repeat):
        function()
    elapsed = time.perf_counter() - start
    share = (busy() - others) / (elapsed * psutil.cpu_count())
    # The system counts in units of 10 ms, too coarse for shorter times.
    return elapsed / repeat, share <= BUSY or elapsed < 0.2


def medians(functions: dict[str, Callable[[], object]], repetitions: int = 5,
            repeat: int = 1) -> dict[str, float]:
    """Median seconds per call of each function, after one warm-up call of each."""
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            for _ in range(1 + RETRIES):
                value, quiet = seconds(function, repeat)
                if quiet:
                    break
            taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def alone(module: str, *arguments) -> float:
    """The number that `python -m module arguments` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    return json.loads(done.stdout)


def highest_memory() -> int:
    """Peak memory of this process, in bytes."""
    if os.path.exists("/proc/self/status"):  # `ru_maxrss` counts the parent's, too
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status
                        if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: list[str]) -> None:
    """Run the named benchmarks, or all of them, and print one table or JSON."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    parser = argparse.ArgumentParser(
        "minigen bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"which to run: {', '.join(names)}; without a name all "
                             f"but {', '.join(LONG)}, which take up to an hour each")
    parser.add_argument("--quick", action="store_true",
                        help="shorter sequences and fewer repetitions")
    parser.add_argument("--json", action="store_true",
                        help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        raise ValueError(f"there is no benchmark {', '.join(sorted(unknown))}: choose "
                         f"from {', '.join(names)}")
    table = {name: importlib.import_module(f"{__name__}.{name}").rows(options.quick)
             for name in options.names or [name for name in names if name not in LONG]}
    if options.json:
        rows = [asdict(row) | {"reached": row.reached, "benchmark": name}
                for name, found in table.items() for row in found]
        about = describe_run(command=" ".join(["python -m minigen bench", *arguments]),
                             quick=options.quick)
        print(json.dumps(about | {"rows": rows}, indent=1))
        return
    print(f"{hardware()}, torch {torch.__version__}")
    for name, found in table.items():
        for row in found:
            sign = ">=" if row.at_least else "<="
            target = "" if row.target is None else f"{sign} {row.target:g}"
            mark = {True: "yes", False: "NO", None: ""}[row.reached]
            print(f"{name:9} {row.case:58} {row.value:10.3g} {row.unit:9} {target:9} "
                  f"{mark:4} {row.note}".rstrip())
