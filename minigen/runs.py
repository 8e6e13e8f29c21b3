"""What all training scripts share: options, the course of a run and its result file;
and access to the runs that ship with the repository."""

import json
import platform
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from minigen.checkpoints import (
    PACKAGE,
    clear_states,
    differences,
    find_checkpoint,
    load,
    save_checkpoint,
)
from minigen.checks import LARGEST, NOT_NEGATIVE, POSITIVE, check_numbers
from minigen.data import Landscapes, load_dataset
from minigen.devices import hardware, is_main_process, join_processes, pick_device
from minigen.files import lock_folder, read_json, write_json
from minigen.metrics import count_flops
from minigen.show import read_grid, save_grid
from minigen.training import (
    FitConfig,
    eval_history,
    evaluate,
    fit,
    progress,
    read_log,
)

DATA = PACKAGE.parent / "data"  # in a clone of the repository


@dataclass(kw_only=True)
class RunConfig(FitConfig):
    """Options of every training script; each script adds those of its model."""

    preset: str = "demo"  # named set of defaults for the other options
    data: str = "landscapes"  # a data set's name, or a folder of images
    size: int = 32  # side of the square images, in pixels
    # images to train on; 0: landscapes, each seen once (not for models of codes)
    train_images: int = 1600
    val_images: int = 64  # images to evaluate on
    on_error: Literal["raise", "skip"] = "raise"  # fail on unreadable images, or skip
    samples: int = 8  # images to generate, or reconstruct, at each evaluation
    resume: bool = False  # continue a stopped run, or return a finished one's result
    overwrite: bool = False  # replace the run in `out`, if there is one
    out: Path = Path("runs")  # checkpoint, images and result.json go here
    steps: int = 400  # optimizer steps
    lr: float = 2e-3  # highest learning rate, reached after the warm-up
    warmup: int = 50  # steps in which the learning rate rises from 0
    ema: float = 0.0  # decay of the averaged weights that are saved; 0: no averaging
    eval_steps: tuple[int, ...] = (100, 400)  # steps, besides the last, to evaluate at
    save_every: int = 200  # steps between two saved states; 0 saves none

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, size=POSITIVE, train_images=(0, LARGEST),
                      val_images=POSITIVE, samples=POSITIVE)

    def dataset(self, split: str) -> Dataset:
        """The data set of `Item` to train on ("train") or to evaluate on ("val")."""
        if split == "train" and not self.train_images:
            if self.data != "landscapes":
                raise ValueError(f"{self.data} is not endless: give --train-images")
            length = self.steps * self.batch_size * self.accumulate
            return Landscapes(self.size, length, seed=self.seed)
        length = self.train_images if split == "train" else self.val_images
        return load_dataset(self.data, self.size, split, length, self.seed,
                            self.on_error)

    def select(self, kind: type, **more):
        """Make a dataclass `kind` from fields of the same names, and from `more`."""
        names = [f.name for f in fields(kind) if hasattr(self, f.name)]
        return kind(**{name: getattr(self, name) for name in names} | more)


TINY = {"size": 16, "train_images": 16, "val_images": 8, "steps": 3, "batch_size": 4,
        "warmup": 1, "eval_steps": (1, 3), "samples": 4, "save_every": 1}  # for "test"


def presets(config: type[RunConfig], **options: dict) -> dict[str, RunConfig]:
    """A configuration for each preset, from the options that change the defaults."""
    return {name: config(preset=name, **values) for name, values in options.items()}


@dataclass(kw_only=True)
class Task:
    """What a script gives to `run`: a model, its data, how to evaluate and save it."""

    model: nn.Module  # what is trained
    data: Dataset  # items to train on
    val: Dataset  # items whose mean loss is the validation loss
    loss: Callable[[nn.Module, object], Tensor]
    evaluate: Callable[[nn.Module, int], dict]  # (model, step) to metrics; draws images
    parts: str = "tokens"  # the unit of `parts_per_image`, to report the speed in
    parts_per_image: int = 1
    # (model, last line of the log) to further metrics of the result
    summarize: Callable[[nn.Module, dict], dict] = lambda model, last: {}
    keep: Callable[[nn.Module], nn.Module] = lambda model: model  # the part to save
    settings: dict = field(default_factory=dict)  # must not change when a run resumes
    before_step: Callable[[int], None] = lambda step: None  # prepares the loss for it


def run(script: str, config: RunConfig, presets: dict[str, RunConfig],
        build: Callable[[RunConfig, torch.device], Task]) -> dict:
    """Train, evaluate and save the model of `build(config, device)`.

    Returns what is in result.json. With several processes, the first evaluates and
    writes, and the others return {}. A finished run is not repeated: `resume` returns
    its result, and without `resume` it is a ValueError. BlockingIOError if another
    process is using the folder.
    """
    device = pick_device()
    processes = join_processes(device)
    if not is_main_process():
        processes.wait_for_everyone()  # until the first has cleared the folder
        finished = (config.out / "result.json").exists()
        return {} if finished else _run(script, config, presets, build, device)
    with lock_folder(config.out):
        result = prepare_folder(config)
        processes.wait_for_everyone()
        return result or _run(script, config, presets, build, device)


def prepare_folder(config: RunConfig) -> dict | None:
    """The result of a finished run, or None if there is something to train.

    `overwrite` first removes the run in the folder. ValueError if the run is finished
    and `resume` is not set, or if its settings differ; the message names the fields.
    """
    file = config.out / "result.json"
    if config.overwrite:
        file.unlink(missing_ok=True)  # first: no result stands beside a newer model
        clear_states(config.out)
        for name in ("log.jsonl", "model.safetensors", "config.json", "classes.png",
                     "step-*.png"):
            for path in config.out.glob(name):
                path.unlink()
    if not file.exists():
        return None
    if not config.resume:
        raise ValueError(f"{config.out} holds a finished run: choose another folder "
                         "with --out, replace it with --overwrite, or get its result "
                         "with --resume")
    result = read_json(file)
    free = ("out", "resume", "overwrite", "save_every", "workers", "tensorboard")
    saved, now = ({k: v for k, v in settings.items() if k not in free}
                  for settings in (result["config"], as_json(config)))
    if found := differences(saved, now):
        raise ValueError(f"{config.out} holds a finished run with other settings: "
                         f"{'; '.join(found)}. Choose another folder with --out, or "
                         "replace it with --overwrite")
    clear_states(config.out)  # which a kill may have left beside the result
    return result


def as_json(config: RunConfig) -> dict:
    """The fields as a JSON file holds them: tuples as lists, and paths as strings."""
    return json.loads(json.dumps(asdict(config), default=str))


def _run(script, config, presets, build, device) -> dict:
    torch.manual_seed(config.seed)
    task = build(config, device)
    ema_model = deepcopy(task.model) if config.ema else None
    kept = task.model if ema_model is None else ema_model
    settings = {"data": config.data, "size": config.size} | task.settings
    per_step = config.batch_size * config.accumulate * task.parts_per_image
    records = fit(task.model, task.data, task.loss, config, ema_model=ema_model,
                  folder=config.out, resume=config.resume, settings=settings,
                  before_step=task.before_step)
    name = f"{script} {config.preset}"
    for record in progress(records, config.steps, per_step, name, task.parts):
        if record.evaluate and is_main_process():
            save_checkpoint(task.keep(kept), config.out)
            val_loss = evaluate(kept, task.val, task.loss, config.batch_size)
            record.metrics |= {"val_loss": val_loss} | task.evaluate(kept, record.step)
    cost = training_cost(task, config)  # by all processes: a step may wait for others
    if not is_main_process():
        return {}
    log = read_log(config.out)
    last = log[-1]
    metrics = {
        "val_loss": last["val_loss"],
        "parameters": sum(p.numel() for p in task.keep(task.model).parameters()),
        f"{task.parts}_per_second": config.steps * per_step / last["seconds"],
    } | task.summarize(kept, last)
    extra = metrics.pop("extra", {})
    result = describe_run(
        command=command_line(script, config, presets[config.preset]), script=script,
        preset=config.preset, minutes=round(last["seconds"] / 60, 2), seed=config.seed,
        cost=cost, dataset=config.data, metrics=metrics,
        history=eval_history(log), config=as_json(config)) | extra
    write_json(config.out / "result.json", result)
    clear_states(config.out)
    return read_json(config.out / "result.json")


def training_cost(task: Task, config: RunConfig) -> dict:
    """The cost of a run: `images_seen`, `threads` of all processes, and `flops`.

    The floating-point operations of forward and backward pass are counted at the last
    step of each stage and multiplied by the number of its steps.
    """
    items = [task.data[n] for n in range(min(2, config.batch_size))]
    batch = send_to_device(default_collate(items), pick_device())
    per_step, end, flops = config.batch_size * config.accumulate, 0, 0.0
    while end < config.steps:
        begin, end = config.stage(end + 1)
        task.before_step(end)
        one = count_flops(task.model, task.loss, batch) / len(items)
        flops += one * per_step * (end - begin)
    threads = torch.get_num_threads() * join_processes(pick_device()).num_processes
    return {"images_seen": config.steps * per_step, "threads": threads, "flops": flops}


def command_line(script: str, config: RunConfig, preset: RunConfig) -> str:
    """The command that repeats a run: its preset, and options that differ from it."""
    options = [f"python -m minigen train {script} --preset {config.preset}"]
    for name, value in vars(config).items():
        if value == getattr(preset, name) or name in ("out", "resume", "overwrite"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            options.append(f"--{flag} {' '.join(map(str, values))}")
    return " ".join(options)


def describe_run(**about) -> dict:
    """`about`, followed by hardware, commit (None without git), date and versions."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "--short", "HEAD"]
    try:
        if not (PACKAGE.parent / ".git").exists():  # not in a clone of this project
            raise FileNotFoundError
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": version("torchvision")}
    return about | {"hardware": hardware(), "commit": commit,
                    "date": date.today().isoformat(), "versions": versions}


@dataclass(kw_only=True)
class SampleOptions:
    """Options of `python -m minigen sample` for every model that generates images."""

    # where prompts and captions come from: a data set's name, or a folder of images
    data: str = "landscapes"
    count: int = 16  # images to generate
    temperature: float = 1.0  # below 1 favors likely values; 0 takes the likeliest
    seed: int = 0  # of the random numbers
    columns: int | None = None  # images per row; None: a roughly square grid
    scale: int = 4  # factor by which the file enlarges the images
    out: Path = Path("samples.png")  # file to write

    def __post_init__(self):
        check_numbers(self, count=POSITIVE, temperature=NOT_NEGATIVE, columns=POSITIVE,
                      scale=POSITIVE)


# ---- runs that ship with the repository

PER_CLASS = 4  # images of each class in a sheet that ships


def ship(run: Path, data: Path = DATA, weights: bool = True) -> None:
    """Copy a finished run into the repository's folder `data`, under its own name.

    The checkpoint goes to `data/checkpoints` in half precision, unless `weights` is
    False. The result goes to `data/results`, and images go to contact sheets there:
    the first four of each class, and those of all steps, or of the last one if the
    weights do not ship.
    """
    run = Path(run).resolve()  # "runs/.." has a name, too
    result = read_json(run / "result.json")
    if weights:
        save_checkpoint(load(run), data / "checkpoints" / run.name, torch.float16)
    config = result["config"]
    steps = sorted(run.glob("step-*.png"))
    sheets = {"classes": list(run.glob("classes.png")),
              "steps": steps if weights else [], "last": [] if weights else steps[-1:]}
    for name, files in sheets.items():
        if files:
            scale = max(1, 128 // config["size"])  # as the scripts save them
            images = torch.cat([read_grid(file, config["size"], scale)
                                for file in files])
            columns = config["samples"]
            if name == "classes":
                images = images.unflatten(0, (-1, columns))[:, :PER_CLASS]
                columns, images = images.shape[1], images.flatten(0, 1)
            save_grid(images, data / "results" / f"{run.name}-{name}.png",
                      columns=columns)
    write_json(data / "results" / f"{run.name}.json", result)


def keep_evaluation(name: str, report: dict) -> None:
    """Add the figures of `python -m minigen evaluate` to the result file of a run.

    `name` is a run's folder or a shipped run. FileNotFoundError without a result file.
    """
    file = Path(name) / "result.json"
    if not file.exists():
        file = DATA / "results" / f"{find_checkpoint(name).name}.json"
    report = report | {"date": date.today().isoformat(), "hardware": hardware()}
    write_json(file, read_json(file) | {"evaluation": report})


def shipped(chapter: str, variant: str) -> str:
    """The name of a shipped run for `load`: of preset full if one ships, else cpu."""
    for preset in ("full", "cpu"):
        name = f"{chapter}-{preset}-{variant}"
        if (DATA / "results" / f"{name}.json").exists():
            return name
    raise FileNotFoundError(f"no result of {chapter} ({variant}) in {DATA / 'results'};"
                            " results come with a clone of the repository")


def shipped_result(name: str) -> dict:
    """The contents of a shipped run's result file."""
    return read_json(DATA / "results" / f"{name}.json")


def shipped_benchmark(name: str) -> dict:
    """The shipped output of `python -m minigen bench --json`, by its file's name."""
    return read_json(DATA / "benchmarks" / f"{name}.json")


def shipped_steps(name: str) -> dict[int, Tensor]:
    """Images (B, 3, H, W) in [0, 1] that a shipped run drew in training, by step."""
    result = shipped_result(name)
    steps = [line["step"] for line in result["history"]]
    sheet = DATA / "results" / f"{name}-steps.png"
    if not sheet.exists():
        sheet, steps = sheet.with_name(f"{name}-last.png"), steps[-1:]
    images = read_grid(sheet, result["config"]["size"])
    return dict(zip(steps, images.chunk(len(steps)), strict=True))


def shipped_classes(name: str) -> Tensor:
    """Images (classes, 4, 3, H, W) in [0, 1] that a shipped run drew at its end.

    Fewer than 4 of each class if the run drew fewer.
    """
    config = shipped_result(name)["config"]
    sheet = read_grid(DATA / "results" / f"{name}-classes.png", config["size"])
    return sheet.unflatten(0, (-1, min(PER_CLASS, config["samples"])))
