"""Train the GPT over patches of chapter 3, generating images along the way."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigen.checkpoints import load
from minigen.data import Item, load_dataset
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
from minigen.sampling import Guidance
from minigen.show import save_grid
from minigen.training import evaluate


@dataclass(kw_only=True)
class Config(RunConfig, PatchConfig):
    """A run of chapter 3. Every field is an option of the command line."""

    size: int = 16  # side of the square images, in pixels
    # what is predicted: the mean of a patch, or a mixture of Gaussians or logistics
    head: Literal["mse", "gaussian", "logistic"] = "logistic"
    labels: bool = True  # condition the model on the class, if there are several
    guidance: float = 2.0  # guidance scale at the evaluations
    depth: int = 4  # blocks, one after the other
    heads: int = 4  # attention heads in each block
    dim: int = 128  # width of the residual stream
    out: Path = Path("runs/patchgpt")  # checkpoint, images and result.json go here


# Width, heads and depth of the document, which names no data, steps or learning rate.
LARGE = {
    "size": 64, "dim": 512, "heads": 8, "depth": 6, "train_images": 50_000,
    "val_images": 1000, "steps": 10_000, "batch_size": 64, "warmup": 500,
    "save_every": 500, "eval_steps": (200, 400, 800, 1600, 3000, 6000, 10_000)}
PRESETS = presets(
    Config,
    test=TINY | {"depth": 1, "heads": 2, "dim": 16, "mixtures": 2},
    # two CPU cores, a quarter of a minute; at this size bfloat16 is slower
    demo={"precision": "float32"},
    # 5e14 FLOPs; about an hour on one core with bf16
    cpu={"size": 64, "train_images": 0, "val_images": 256, "depth": 6, "heads": 5,
         "dim": 160, "steps": 3611, "batch_size": 32, "warmup": 100, "ema": 0.998,
         "save_every": 250, "eval_steps": (100, 200, 400, 800, 1600, 3611)},
    full=LARGE | {"lr": 1e-3, "ema": 0.999},  # one GPU
    # the document's model with its mistakes corrected
    paper=LARGE | {"lr": 3e-4, "head": "mse", "above": False, "positions": "learned",
                   "labels": False},
)


def without_class(model: PatchGPT, batch: Item) -> Tensor:
    """`next_patch_loss` without the classes, for a model that knows them."""
    labels = torch.full_like(batch.label, model.config.classes)
    return next_patch_loss(model, batch._replace(label=labels))


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 3 and its data.

    In the image file of a step, the upper row is generated from scratch, one class
    after another, and the lower row completes the top halves of validation images.
    `classes.png` has a row for each of up to sixteen classes.
    """
    train, val, columns = config.dataset("train"), config.dataset("val"), config.samples
    classes = len(train.classes) if config.labels and len(train.classes) > 1 else 0
    guidance = Guidance(config.guidance) if classes else None
    model = PatchGPT(config.select(
        PatchGPTConfig, height=config.size, width=config.size, classes=classes))
    model.to(device)
    images = torch.stack([item.image for item in val])
    known = torch.tensor([item.label for item in val])
    tops = model.encode(images[:columns])[:, : model.length // 2]

    def seeded() -> torch.Generator:
        return torch.Generator(device).manual_seed(config.seed)

    def draw(model: PatchGPT, name: str, *rows: tuple[int | Tensor, Tensor]) -> Tensor:
        generator = seeded()
        drawn = [model.generate_images(
            prompt, labels if classes else None, guidance=guidance,
            generator=generator).cpu() for prompt, labels in rows]
        save_grid(torch.cat(drawn), config.out / name, columns=columns,
                  scale=max(1, 128 // config.size))
        return drawn[0]

    def measure(model: PatchGPT, step: int) -> dict:
        labels = torch.arange(len(tops)) % max(1, classes)
        drawn = draw(model, f"step-{step:05d}.png", (len(tops), labels),
                     (tops, known[: len(tops)]))
        error = evaluate(model, val, next_patch_error, config.batch_size)
        return {"val_error": 255 * error**0.5} | image_statistics(drawn, images)

    def seconds(model: PatchGPT, **options) -> float:
        start = time.perf_counter()
        model.generate_images(1, generator=seeded(), **options)
        return time.perf_counter() - start

    def summarize(model: PatchGPT, last: dict) -> dict:
        real, drawn = exposure_bias(model, images[:64], tops.shape[1], seeded(),
                                    known[:64] if classes else None)
        metrics = {"seconds_per_image": seconds(model),
                   "error_in_levels": last["val_error"]}
        if config.head != "mse":
            metrics["bits_per_dimension"] = last["val_loss"] / math.log(2)
        if classes:
            labels = torch.arange(min(classes, 16)).repeat_interleave(columns)
            draw(model, "classes.png", (len(labels), labels))
            metrics["seconds_per_image_guided"] = seconds(
                model, labels=labels[:1], guidance=Guidance(2.0))
            loss = evaluate(model, val, without_class, config.batch_size)
            if config.head != "mse":
                metrics["bits_per_dimension_without_class"] = loss / math.log(2)
        for name in ("correlation_along_rows", "correlation_along_columns"):
            metrics[name] = last[name]
        errors = {"after_real_patches": real, "after_drawn_patches": drawn}
        errors = {name: error.tolist() for name, error in errors.items()}
        return metrics | {"extra": {"exposure_bias": errors}}

    return Task(model=model, data=train, val=val, loss=next_patch_loss,
                evaluate=measure, summarize=summarize, parts="patches",
                parts_per_image=model.length)


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("patchgpt", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(Options):
    """Generate images with a checkpoint of chapter 3."""

    # what is given of validation images of `data`: nothing, one patch, or the top half
    start: Literal["nothing", "patch", "half"] = "nothing"
    label: int | None = None  # class of all; None: each in turn, or those of `data`
    guidance: float = 1.0  # guidance scale: 1 is none, 0 ignores the class


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, Tensor | None]:
    """Images (N, 3, H, W) in [0, 1] of the model `load(checkpoint)`, and their labels.

    The labels (N,) are None if the model has no classes. At most 100 images are drawn
    at a time.
    """
    device, count = pick_device(), options.count
    model = load(checkpoint, PatchGPT).to(device)
    prompt, labels = None, torch.arange(count) % max(1, model.config.classes)
    if options.start != "nothing":
        given = 1 if options.start == "patch" else model.length // 2
        val = load_dataset(options.data, model.config.height, "val", count)
        chosen = [val[n % len(val)] for n in range(count)]  # a small folder repeats
        prompt = model.encode(torch.stack([item.image for item in chosen]))[:, :given]
        labels = torch.tensor([item.label for item in chosen])
    if options.label is not None:
        labels = torch.full((count,), options.label)
    elif not model.config.classes:
        labels = None
    generator, drawn = torch.Generator(device).manual_seed(options.seed), []
    for part in torch.arange(count).split(100):
        drawn.append(model.generate_images(
            len(part) if prompt is None else prompt[part],
            None if labels is None else labels[part],
            guidance=Guidance(options.guidance), temperature=options.temperature,
            generator=generator).cpu())
    return torch.cat(drawn), labels


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write a grid of the images that `draw` returns; return the file."""
    images, _ = draw(checkpoint, options)
    save_grid(images, options.out, scale=options.scale, columns=options.columns)
    return options.out
