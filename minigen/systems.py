"""The systems that the book compares: how each is trained, and what was measured."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minigen.files import read_json
from minigen.runs import DATA

SEARCHED = ("full", "cpu")  # presets whose results are compared, the best first
OF64, OF256 = "--tokenizer {vq-tokens64} ", "--tokenizer {vq-tokens256} "
CODES64, CODES256 = OF64 + "--codes-in {codes64} ", OF256 + "--codes-in {codes256} "
SMALL = CODES64 + ("--depth 4 --heads 2 --dim 128 --batch-size 64 --lr 0.002 "
                   "--ema 0.999 --save-every 500 ")
GUIDED, DECODING = "--guidance 2 ", "--steps 8 --method euler"
COARSE = "--downsample 8 --channels 28 --z-channels 16 "
FINE = COARSE + "--lr 0.0005 --warmup 50 "


@dataclass(frozen=True)
class System:
    """A run of the book, with the options of `train` and `evaluate` that repeat it.

    In the options, `{NAME}` stands for the run of an earlier system, and `{codes64}`
    for a folder of codes that several systems share.
    """

    name: str  # CHAPTER-VARIANT; its run is called CHAPTER-PRESET-VARIANT
    title: str
    cpu: str | None = ""  # options of `train` at preset `cpu`; None: not trained there
    other: str | None = ""  # the same at all other presets
    evaluate: str = ""  # options of `evaluate`
    most: int | None = None  # images to measure at most, of a slow system
    sequential: int | str = 1  # network passes per image, one after another
    compared: bool = True  # whether it generates images; tokenizers do not

    @property
    def chapter(self) -> str:
        """The chapter, which is also the name of its training script."""
        return self.name.partition("-")[0]

    def run(self, preset: str) -> str:
        """The name of the run at a preset."""
        return f"{self.chapter}-{preset}-{self.name.partition('-')[2]}"

    def options(self, preset: str) -> str | None:
        """Options of `train` besides the preset; None if the preset has no such run."""
        return self.cpu if preset == "cpu" else self.other

    def needs(self, preset: str) -> list[str]:
        """Names of the systems whose runs this one needs."""
        text = f"{self.options(preset)} {self.evaluate}"
        return [name for name in re.findall(r"\{([\w-]+)\}", text) if "-" in name]


SYSTEMS = (
    System("vq-tokens256", "tokenizer, 256 tokens", other="--downsample 4",
           compared=False),
    System("vq-coarse1", "tokenizer, 64 tokens: autoencoder", COARSE +
           "--steps 6850 --eval-steps 100 400 1000 2000 4000 6850", None,
           compared=False),
    System("vq-coarse2", "tokenizer, 64 tokens: with a discriminator", FINE +
           "--steps 1000 --ema 0.995 --seed 1 --eval-steps 500 1000 "
           "--init {vq-coarse1} --features 0.4 --adversarial 0.2", None,
           compared=False),
    System("vq-coarse3", "tokenizer, 64 tokens: its decoder alone", FINE +
           "--steps 500 --ema 0.99 --seed 2 --eval-steps 250 500 --val-images 200 "
           "--init {vq-coarse2} --decoder-only --features 0.5 --adversarial 0.05",
           None, compared=False),
    System("vq-tokens64", "tokenizer, 64 tokens", FINE +
           "--steps 1500 --ema 0.995 --seed 3 --eval-steps 500 1000 1500 "
           "--val-images 200 --init {vq-coarse3} --decoder-only --features 0.5 "
           "--adversarial 0.05", "--downsample 8", compared=False),
    System("pixelgpt-64", "PixelGPT", most=300, sequential="pixels"),
    System("pixelgpt-published", "PixelGPT as published",
           "--positions learned --sequences windows",
           "--positions learned --sequences windows", most=300, sequential="pixels"),
    System("patchgpt-squared", "PatchGPT, squared error",
           "--head mse --steps 4323 --eval-steps 100 400 1600 4323", "--head mse",
           GUIDED, sequential="patches"),
    System("patchgpt-normal", "PatchGPT, Gaussians",
           "--head gaussian --steps 4119 --eval-steps 100 400 1600 4119",
           "--head gaussian", GUIDED, sequential="patches"),
    System("patchgpt-classes", "PatchGPT, logistic mixtures", evaluate=GUIDED,
           sequential="patches"),
    System("imagegpt-tokens64", "ImageGPT, 64 tokens", SMALL +
           "--steps 20690 --eval-steps 500 2000 5000 10000 20690", CODES64,
           GUIDED + OF64, sequential=64),
    System("imagegpt-tokens256", "ImageGPT, 256 tokens", CODES256, CODES256,
           GUIDED + OF256, sequential=256),
    System("maskgit-tokens64", "MaskGIT, 64 tokens", SMALL +
           "--steps 20690 --eval-steps 500 2000 5000 10000 20690", CODES64,
           GUIDED + OF64, sequential=8),
    System("maskgit-tokens256", "MaskGIT, 256 tokens", CODES256, CODES256,
           GUIDED + OF256, sequential=8),
    System("npp-tokens64", "Next Patch Prediction", SMALL +
           "--steps 28000 --eval-steps 500 2000 5000 14000 28000", CODES64,
           OF64, sequential=64),
    System("anytoany-tokens64", "any to any, from captions", CODES64, CODES64, OF64,
           sequential=64),
    System("diffusion-classes", "diffusion of pixels",
           evaluate="--steps 16 --method euler", sequential=16),
    System("diffusion-tokens64", "ImageGPT, 64 tokens, diffusion decoder",
           "--decoder " + CODES64, "--decoder " + CODES64,
           OF64 + "--prior {imagegpt-tokens64} " + DECODING, sequential=64 + 8),
    System("diffusion-tokens256", "ImageGPT, 256 tokens, diffusion decoder",
           "--decoder " + CODES256 + "--steps 10000 --eval-steps 500 2000 5000 10000",
           "--decoder " + CODES256,
           OF256 + "--prior {imagegpt-tokens256} " + DECODING, sequential=256 + 8),
)


def compared() -> list[System]:
    """The systems that generate images, in the order of the book."""
    return [system for system in SYSTEMS if system.compared]


@dataclass(frozen=True)
class Measured:
    """What the result files say about a system; values are None where they are silent.

    Every number of the comparison is read through this class.
    """

    system: System
    run: str | None  # the run whose result file was found
    result: dict  # the contents of that file; {} if there is none

    def checkpoint(self, data: Path = DATA, runs: Path | None = None) -> Path | None:
        """Its checkpoint in `data`, else your finished run in `runs`, or None."""
        if self.run is None:
            return None
        if (shipped := data / "checkpoints" / self.run).exists():
            return shipped
        own = runs and runs / self.run
        return own if own and (own / "result.json").exists() else None

    def metric(self, name: str) -> float | None:
        """A metric that the training run wrote, or None."""
        return self.result.get("metrics", {}).get(name)

    def figure(self, name: str, part: str = "value") -> float | None:
        """A figure of `evaluate`: its value, its spread, or real images' floor."""
        report = self.result.get("evaluation", {})
        return report.get("figures", {}).get(name, {}).get(part)

    @property
    def images_measured(self) -> int | None:
        """The number of images that `evaluate` measured."""
        return self.result.get("evaluation", {}).get("N")

    @property
    def flops(self) -> float | None:
        """Floating-point operations of the training."""
        return self.result.get("cost", {}).get("flops")

    @property
    def images_seen(self) -> int | None:
        """How many images the training saw, counting repetitions."""
        return self.result.get("cost", {}).get("images_seen")

    @property
    def core_hours(self) -> float | None:
        """Hours of training multiplied by the number of threads."""
        threads = self.result.get("cost", {}).get("threads")
        return None if threads is None else self.result["minutes"] / 60 * threads

    @property
    def sequential(self) -> int | None:
        """How many network passes an image takes, one after another."""
        steps = self.system.sequential
        if isinstance(steps, int):
            return steps
        if (config := self.result.get("config")) is None:
            return None
        side = config["patch_size"] if steps == "patches" else 1
        return (config["size"] // side) ** 2


def measured(data: Path = DATA, systems: Iterable[System] | None = None,
             presets: tuple[str, ...] = SEARCHED) -> list[Measured]:
    """Results of each system in `data`, from the first of `presets` that has a file."""
    found = []
    for system in compared() if systems is None else systems:
        files = [data / "results" / f"{system.run(preset)}.json" for preset in presets]
        file = next((file for file in files if file.exists()), None)
        found.append(Measured(system, file and file.stem,
                              read_json(file) if file else {}))
    return found


def timed(data: Path = DATA) -> dict[tuple[str, str], float]:
    """The values that `bench comparison` wrote to `data`, keyed by (run, case)."""
    file = data / "benchmarks" / "comparison-cpu.json"
    rows = read_json(file)["rows"] if file.exists() else []
    return {tuple(row["case"].split(": ", 1)): row["value"] for row in rows}


MISSING = "not measured yet"


def number(value: float | None, form: str) -> str | None:
    """A value formatted by `form`, such as {:.2f}; None stays None."""
    return None if value is None else form.format(value)


def with_spread(each: Measured, name: str, digits: int) -> str | None:
    """A figure of `evaluate` as text, with its standard error if it has one."""
    value, spread = each.figure(name), each.figure(name, "spread")
    text = number(value, f"{{:.{digits}f}}")
    return text if spread is None else f"{text}\u00a0±\u00a0{spread:.{digits}f}"


# heading: a function that returns the text of a cell, and the file that it needs
COLUMNS: dict[str, tuple[Callable[[Measured, dict], str | None], str]] = {
    "passes": (lambda m, t: number(m.sequential, "{:,}"), "run"),
    "parameters": (lambda m, t: number(m.metric("parameters"), "{:,.0f}"), "run"),
    "operations": (lambda m, t: number(m.flops, "{:.1e}"), "run"),
    "images seen": (lambda m, t: number(m.images_seen, "{:,}"), "run"),
    "core-hours": (lambda m, t: number(m.core_hours, "{:.1f}"), "run"),
    "trained on": (lambda m, t: m.result.get("hardware"), "run"),
    "bits per dimension": (
        lambda m, t: number(m.metric("bits_per_dimension"), "{:.2f}"), "run"),
    "seconds per image": (
        lambda m, t: number(t.get((m.run, "one at a time")), "{:.2g}"), "timing"),
    "sixteen at once": (
        lambda m, t: number(t.get((m.run, "sixteen at once")), "{:.2g}"), "timing"),
    "nearest": (lambda m, t: number(t.get((m.run, "nearest")), "{:.2f}"), "timing"),
    "FD-landscape": (lambda m, t: with_spread(m, "FD-landscape", 1), "evaluation"),
    "of real images": (
        lambda m, t: number(m.figure("FD-landscape", "floor"), "{:.1f}"), "evaluation"),
    "precision": (lambda m, t: number(m.figure("precision"), "{:.2f}"), "evaluation"),
    "recall": (lambda m, t: number(m.figure("recall"), "{:.2f}"), "evaluation"),
    "class accuracy": (
        lambda m, t: number(m.figure("class accuracy"), "{:.1%}"), "evaluation"),
    "images": (lambda m, t: number(m.images_measured, "{:,}"), "evaluation"),
}
BRIEF = ("FD-landscape", "class accuracy", "seconds per image")  # in the README


def cell(column: str, each: Measured, times: dict) -> str:
    """The text of a cell: a number, `MISSING` if it was not measured, or a dash.

    A dash marks what does not apply, such as class accuracy without classes.
    """
    write, file = COLUMNS[column]
    if text := write(each, times):
        return text
    there = {"run": each.run, "evaluation": each.images_measured, "timing": None}
    return "-" if there[file] else MISSING


def table(columns: Iterable[str] = tuple(COLUMNS), data: Path = DATA,
          presets: tuple[str, ...] = SEARCHED) -> str:
    """A Markdown table with a row for each system that generates images."""
    columns, times = list(columns), timed(data)
    rows = [["system", *columns], ["---", *["---:"] * len(columns)]]
    for each in measured(data, presets=presets):
        cells = [cell(column, each, times) for column in columns]
        if each.run is None:  # said once
            cells = [MISSING, *[""] * (len(columns) - 1)]
        rows.append([each.system.title, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
