"""Train the GPT over patches of chapter 3, generating images along the way."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minigen.checkpoints import load
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.patchgpt import (
    PatchConfig,
    PatchGPT,
    PatchGPTConfig,
    exposure_bias,
    next_patch_error,
    next_patch_loss,
)
from minigen.pixelgpt import image_statistics
from minigen.runs import TINY, RunConfig, Task, presets, run
from minigen.runs import SampleOptions as Options
from minigen.show import save_grid
from minigen.training import evaluate


@dataclass(kw_only=True)
class Config(RunConfig, PatchConfig):
    """A run of chapter 3. Every field is an option of the command line."""

    size: int = 16  # side of the square images, in pixels
    head: Literal["mse", "gaussian", "logistic"] = "logistic"  # one guess or a mixture
    depth: int = 4  # blocks, one after the other
    heads: int = 4  # attention heads in each block
    dim: int = 128  # width of the residual stream
    out: Path = Path("runs/patchgpt")  # checkpoint, images and result.json go here


# The document's width, heads and depth. It names no data, steps or rate.
LARGE = {
    "size": 64, "dim": 512, "heads": 8, "depth": 6, "train_images": 50_000,
    "val_images": 1000, "steps": 10_000, "batch_size": 64, "warmup": 500,
    "save_every": 500, "eval_steps": (200, 400, 800, 1600, 3000, 6000, 10_000)}
PRESETS = presets(
    Config,
    test=TINY | {"depth": 1, "heads": 2, "dim": 16, "mixtures": 2},
    # two CPU cores, a quarter of a minute; at this size bfloat16 is slower
    demo={"precision": "float32"},
    cpu={"size": 64, "train_images": 12_000, "val_images": 256, "steps": 5000,
         "warmup": 100, "ema": 0.995,  # one CPU core, half an hour
         "eval_steps": (50, 100, 200, 400, 800, 1600, 3000, 5000)},
    full=LARGE | {"lr": 1e-3, "ema": 0.999},  # one GPU
    # the document's model with its mistakes corrected
    paper=LARGE | {"lr": 3e-4, "head": "mse", "above": False, "positions": "learned"},
)


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 3 and its data.

    The upper row of an image file is drawn from nothing; the lower one completes the
    top halves of validation images.
    """
    shape = config.select(PatchGPTConfig, height=config.size, width=config.size)
    model = PatchGPT(shape).to(device)
    val = config.dataset("val")
    images = torch.stack([item.image for item in val])
    tops = model.encode(images[: config.samples])[:, : model.length // 2]

    def seeded() -> torch.Generator:
        return torch.Generator(device).manual_seed(config.seed)

    def measure(model: PatchGPT, step: int) -> dict:
        generator = seeded()
        drawn, completed = (model.generate_images(prompt, generator=generator).cpu()
                            for prompt in (len(tops), tops))
        save_grid(torch.cat([drawn, completed]), config.out / f"step-{step:05d}.png",
                  columns=len(tops), scale=max(1, 128 // config.size))
        error = evaluate(model, val, next_patch_error, config.batch_size)
        return {"val_error": 255 * error**0.5} | image_statistics(drawn, images)

    def summarize(model: PatchGPT, last: dict) -> dict:
        real, drawn = exposure_bias(model, images[:64], tops.shape[1], seeded())
        start = time.perf_counter()
        model.generate_images(1, generator=seeded())
        metrics = {"seconds_per_image": time.perf_counter() - start,
                   "error_in_levels": last["val_error"]}
        if config.head != "mse":
            metrics["bits_per_dimension"] = last["val_loss"] / math.log(2)
        for name in ("correlation_along_rows", "correlation_along_columns"):
            metrics[name] = last[name]
        errors = {"after_real_patches": real, "after_drawn_patches": drawn}
        errors = {name: error.tolist() for name, error in errors.items()}
        return metrics | {"extra": {"exposure_bias": errors}}

    return Task(model=model, data=config.dataset("train"), val=val,
                loss=next_patch_loss, evaluate=measure, summarize=summarize,
                parts="patches", parts_per_image=model.length)


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("patchgpt", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(Options):
    """Images drawn by a checkpoint of chapter 3."""

    start: Literal["nothing", "patch", "half"] = "nothing"  # what is given


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Draw a grid of images with the model that `load(checkpoint)` finds."""
    device = pick_device()
    model = load(checkpoint, PatchGPT).to(device)
    prompt = options.count
    if options.start != "nothing":
        given = 1 if options.start == "patch" else model.length // 2
        val = load_dataset(options.data, model.config.height, "val", options.count)
        patches = model.encode(torch.stack([item.image for item in val]))[:, :given]
        prompt = patches[torch.arange(options.count) % len(patches)]
    images = model.generate_images(
        prompt, temperature=options.temperature,
        generator=torch.Generator(device).manual_seed(options.seed))
    save_grid(images.cpu(), options.out, scale=options.scale, columns=options.columns)
    return options.out
