"""Train and measure every system of the book, one after another, and resume after a
kill: `python -m minigen reproduce`. `--check` measures again and compares."""

import io
import json
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.font_manager import findfont as find_font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minigen.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from minigen.data import CLASSES, Item, load_dataset
from minigen.files import atomic_write, read_json
from minigen.runs import DATA, ship
from minigen.show import image_grid, read_grid
from minigen.systems import SEARCHED, SYSTEMS, Measured, System, measured, table

# columns of the table that is printed at the end
SUMMARY = ("operations", "FD-landscape", "of real images", "class accuracy")
Command = Callable[[list[str]], int]  # the command line: arguments in, exit status out


@dataclass
class ReproduceOptions:
    """Train, measure and save every system of the book. Run again to resume."""

    # chapters or systems to run, such as vq or imagegpt-tokens64; if empty, all
    only: tuple[str, ...] = ()
    preset: Literal["cpu", "full", "demo", "test"] = "cpu"  # of the training scripts
    minutes: float | None = None  # stop after this many; run again to resume
    count: int = 1000  # images to generate and measure for each system
    out: Path = Path("runs")  # folder for runs; what can ship is copied to its `data`
    dry_run: bool = False  # only list what is left, and how long shipped runs took
    check: bool = False  # instead, measure what is in `data` again, and compare
    sheet: Path | None = None  # instead, write a picture of the systems in `data`
    data: Path | None = None  # for `check` and `sheet`; None: the repository's data

    def __post_init__(self):
        check_numbers(self, minutes=NOT_NEGATIVE, count=POSITIVE)
        self.data = self.data or DATA


def chosen(only: tuple[str, ...]) -> list[System]:
    """The systems of these names or chapters, in order; all if none is given."""
    names = [name for system in SYSTEMS for name in (system.name, system.chapter)]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"there is no system {', '.join(unknown)}; there are "
                         f"{', '.join(system.name for system in SYSTEMS)}")
    return [system for system in SYSTEMS
            if not only or {system.name, system.chapter} & set(only)]


@dataclass(frozen=True)
class Job:
    """One system at one preset, and the commands that train and measure it."""

    system: System
    preset: str
    out: Path
    count: int

    @property
    def folder(self) -> Path:
        """The folder of its run."""
        return self.out / self.system.run(self.preset)

    @property
    def kept(self) -> Path:
        """The result file that `ship` writes last; once it exists, the job is done."""
        return self.out / "data" / "results" / f"{self.folder.name}.json"

    def fill(self, text: str) -> list[str]:
        """Split options into words, with a checkpoint for each {NAME}; see `fill`."""
        return fill(text, self.preset, self.out / "data" / "checkpoints", self.out)

    def train(self) -> list[str]:
        """The arguments of the command that trains it, or resumes its training."""
        options = self.system.options(self.preset)
        return ["train", self.system.chapter, "--preset", self.preset,
                *self.fill(options), "--out", str(self.folder), "--resume"]

    def evaluate(self) -> list[str]:
        """The arguments of the command that measures it."""
        count = min(self.count, self.system.most or self.count)
        return ["evaluate", str(self.folder), "--save", "--count", str(count),
                *self.fill(self.system.evaluate)]

    def result(self) -> dict | None:
        """Its result, or None if the training has not ended."""
        file = self.folder / "result.json"
        return read_json(file) if file.exists() else None

    def state(self) -> str:
        """How far it is: "to do", "step N", "trained", "measured" or "done"."""
        if (result := self.result()) is not None:
            if "evaluation" not in result:
                return "trained"
            return "done" if self.kept.exists() else "measured"
        log = self.folder / "log.jsonl"
        text = log.read_text() if log.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a kill may cut the last
        return f"step {json.loads(lines[-1])['step']}" if lines else "to do"

    def minutes(self) -> float | None:
        """Minutes that the shipped run took, or None if none ships."""
        file = DATA / "results" / f"{self.folder.name}.json"
        return read_json(file)["minutes"] if file.exists() else None


def fill(text: str, preset: str, checkpoints: Path, out: Path = Path()) -> list[str]:
    """Split options into words, with a checkpoint in place of each {NAME}.

    It is the system's checkpoint in `checkpoints`, else the shipped one. Both are in
    half precision: models are trained on the codes of a tokenizer as it ships, since
    more precise weights could give an image other codes.
    """
    places = {f"codes{n}": out / f"codes{n}-{preset}" for n in (64, 256)}
    for system in SYSTEMS:
        run = system.run(preset)
        own = checkpoints / run
        places[system.name] = own if own.exists() else run
    return [word.format_map(places) for word in shlex.split(text)]


def plan(options: ReproduceOptions) -> list[Job]:
    """All jobs of these options, done or not, each after those that it needs.

    What a chosen system needs is trained, too, unless it ships.
    """
    names = {system.name for system in chosen(options.only)}
    runs = {system.name: system.run(options.preset) for system in SYSTEMS}
    for system in reversed(SYSTEMS):  # what a system needs comes before it
        if system.name in names:
            names |= {name for name in system.needs(options.preset)
                      if not (DATA / "checkpoints" / runs[name]).exists()}
    return [Job(system, options.preset, options.out, options.count)
            for system in SYSTEMS if system.name in names
            and system.options(options.preset) is not None]


def describe(jobs: list[Job]) -> str:
    """The plan as text: each job's state, and the minutes that its shipped run took."""
    lines, total, unknown = [], 0.0, 0
    for job in jobs:
        minutes, state = job.minutes(), job.state()
        if state not in ("done", "measured", "trained"):
            total, unknown = total + (minutes or 0), unknown + (minutes is None)
        about = "not measured yet" if minutes is None else f"{minutes:.0f} min"
        lines.append(f"{job.folder.name:28} {state:12} {about}")
    more = f", and {unknown} runs of unknown length" if unknown else ""
    return "\n".join([*lines, f"left: {total:.0f} min of training, as long as the "
                              f"shipped runs took{more}"])


@contextmanager
def at_most(minutes: float | None) -> Iterator[None]:
    """Send SIGTERM to this process after `minutes`; None: never.

    A training run then saves its state and exits. At any other time the signal raises
    SystemExit, which loses nothing, since all finished work is in files.
    """
    def leave(*_):
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    timer = None if minutes is None else threading.Timer(
        60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)


def reproduce(options: ReproduceOptions, command: Command) -> int:
    """Run the jobs that are not done; return the exit status. `command` is the CLI."""
    jobs = plan(options)
    if options.dry_run:
        print(describe(jobs))
        return 0
    print(describe(jobs), flush=True)
    started = time.perf_counter()
    try:
        with at_most(options.minutes):
            for number, job in enumerate(jobs, start=1):
                if job.state() == "done":
                    continue
                spent = (time.perf_counter() - started) / 60
                print(f"\n[{number} of {len(jobs)}, after {spent:.1f} min] "
                      f"{job.folder.name}", flush=True)
                if (status := make(job, command)) == 128 + signal.SIGINT:
                    return status
                if status:
                    print(f"{job.folder.name} failed: run the same command to try "
                          "again, or choose others with --only", file=sys.stderr)
                    return status
    except SystemExit as left:
        if left.code == 128 + signal.SIGTERM:
            print(f"\nStopped; the same command goes on.\n{describe(jobs)}",
                  flush=True)
        raise
    data = options.out / "data"
    print(f"\n{table(SUMMARY, data, (options.preset,))}\n"
          f"Results, pictures and checkpoints are in {data}.")
    return 0


def make(job: Job, command: Command) -> int:
    """Train, measure and ship one system, skipping what is done; the exit status."""
    if job.result() is None:
        if status := command(job.train()):
            return status
    if "evaluation" not in job.result():
        if status := command(job.evaluate()):
            return status
    ship(job.folder, job.out / "data")
    return 0


# ---- systems that are trained already


def there(options: ReproduceOptions, runs: Path | None = None
          ) -> Iterator[tuple[Measured, Path]]:
    """Yield each chosen system with a checkpoint in `data` or `runs`, and its path."""
    presets = options.preset, *SEARCHED
    for each in measured(options.data, chosen(options.only), presets):
        if checkpoint := each.checkpoint(options.data, runs):
            yield each, checkpoint


def check(options: ReproduceOptions, command: Command) -> int:
    """Measure what is in `data` again and compare: 1 if a figure differs, else 0.

    A figure may differ by three standard errors, by 2 percent, or by 3/N for N images,
    whichever is most: another machine rounds differently, and may draw other tokens.
    """
    wrong = compared = 0
    for each, checkpoint in there(options):
        if (report := each.result.get("evaluation")) is None:
            continue
        print(f"{each.run}, {report['N']} images", flush=True)
        again = measure_again(checkpoint, report, drawing(each, checkpoint), command)
        if again["hash"] != report["hash"]:
            print(f"  measured with another network: {again['hash']} now, "
                  f"{report['hash']} in the file")
            wrong += 1
        for name, figure in report["figures"].items():
            if name not in again["figures"]:
                print(f"  {name:24} is not measured any more   DIFFERS", flush=True)
                wrong, compared = wrong + 1, compared + 1
                continue
            now, then = again["figures"][name]["value"], figure["value"]
            allowed = max(3 * (figure["spread"] or 0), 0.02 * abs(then),
                          3 / report["N"])
            good = abs(now - then) <= allowed
            wrong, compared = wrong + (not good), compared + 1
            print(f"  {name:24} {now:9.4g} now, {then:9.4g} in the file, "
                  f"{allowed:.2g} allowed" + ("" if good else "   DIFFERS"), flush=True)
    if not compared:
        raise ValueError(f"{options.data} holds no measured system of these names with "
                         "its checkpoint: nothing was compared")
    print(f"All {compared} figures agree." if not wrong else
          f"Of {compared} figures, {wrong} differ.")
    return int(wrong > 0)


def measure_again(checkpoint: Path, report: dict, options: list[str],
                  command: Command) -> dict:
    """The report of `evaluate` with these options, for as many images as before."""
    words = ["evaluate", str(checkpoint), "--json", "--count", str(report["N"]),
             "--reference", report["reference"], "--seed", str(report["seed"]),
             "--subsets", str(report["subsets"] or 1), *options]
    with redirect_stdout(io.StringIO()) as printed:
        status = command(words)
    if status:
        raise ValueError(f"{checkpoint.name} could not be measured: see above")
    return json.loads(printed.getvalue())


def drawing(each: Measured, checkpoint: Path) -> list[str]:
    """The options with which `evaluate` samples from a system."""
    return fill(each.system.evaluate, each.run.split("-")[1], checkpoint.parent)


def sheet(options: ReproduceOptions, command: Command) -> int:
    """Write a picture of nine uncurated images per system, with a class per column.

    All have seed 0. A run whose weights do not ship is included if it is in
    `options.out`.
    """
    size, height, left = 64, 66, 272
    rows = {"real images": torch.stack([item.image for item in examples(size)])}
    for each, checkpoint in there(options, options.out):
        if each.system.compared:
            rows[each.system.title] = nine(each, checkpoint, command)
    picture = Image.new("RGB", (left + 9 * height, 16 + height * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.truetype(find_font("DejaVu Sans"), 12)  # comes with matplotlib
    for n, name in enumerate(CLASSES):
        pen.text((left + n * height + size // 2, 8), name, "black", font, "mm")
    for n, (title, images) in enumerate(rows.items()):
        top = 16 + n * height
        pen.text((left - 8, top + size // 2), title, "black", font, "rm")
        picture.paste(image_grid(images, columns=9, padding=2), (left, top))
    with atomic_write(options.sheet) as temporary:
        picture.save(temporary)
    print(f"{options.sheet}: {', '.join(rows)}")
    return 0


def examples(size: int) -> list[Item]:
    """The first validation image of each class."""
    items = list(load_dataset("landscapes", size, "val", 100))
    return [next(item for item in items if item.label == label)
            for label in range(len(CLASSES))]


def nine(each: Measured, checkpoint: Path, command: Command) -> Tensor:
    """Nine images (9, 3, H, W) in [0, 1], one per class if the model has classes."""
    size, images = each.result["config"]["size"], []
    asked = [["--count", "9"]] if each.system.chapter != "anytoany" else [
        ["--count", "1", "--text", item.caption] for item in examples(size)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.png"
        for words in asked:
            with redirect_stdout(io.StringIO()):
                status = command(["sample", str(checkpoint), *words, "--columns", "9",
                                  "--scale", "1", "--seed", "0", "--out", str(file),
                                  *drawing(each, checkpoint)])
            if status:
                raise ValueError(f"{each.run} could not generate images: see above")
            images.append(read_grid(file, size))
    return torch.cat(images)
