"""Train the pixel GPT of chapter 1, generating images along the way."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minigen.checkpoints import load
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.pixelgpt import (
    PixelGPT,
    PixelGPTConfig,
    TokenDataset,
    WindowDataset,
    image_statistics,
    next_pixel_loss,
)
from minigen.runs import TINY, RunConfig, Task, presets, run
from minigen.runs import SampleOptions as Options
from minigen.show import save_grid


@dataclass(kw_only=True)
class Config(RunConfig, PixelGPTConfig):
    """A run of chapter 1. Every field is an option of the command line."""

    # whole images, or windows of all images end to end, one pixel shorter, as published
    sequences: Literal["images", "windows"] = "images"
    temperature: float = 1.0  # of sampling at the evaluations
    out: Path = Path("runs/pixelgpt")  # checkpoint, images and result.json go here


# 10,000 steps at 64 x 64; evaluated at those whose images the published page shows
LONG = {
    "size": 64, "train_images": 50_000, "val_images": 1000, "steps": 10_000,
    "save_every": 500, "eval_steps": (200, 400, 800, 1600, 3000, 6000, 10_000)}
PRESETS = presets(
    Config,
    test=TINY | {"depth": 1, "heads": 2, "dim": 16},
    # two CPU cores, half a minute
    demo={"size": 16, "bits": 3, "depth": 2, "dim": 64, "train_images": 2000,
          "steps": 400, "batch_size": 16, "lr": 8e-3, "warmup": 20, "temperature": 0.8,
          "eval_steps": (20, 100, 400), "save_every": 100},
    # 5e14 FLOPs: an hour on one core with bfloat16
    cpu={"size": 64, "positions": "rowcol", "train_images": 12_000, "val_images": 64,
         "steps": 950, "batch_size": 4, "lr": 3e-3, "warmup": 50, "ema": 0.99,
         "samples": 9, "save_every": 50, "eval_steps": (100, 300, 950)},
    full=LONG | {"batch_size": 16, "lr": 1e-3, "warmup": 100, "ema": 0.999},  # one GPU
    # nanoGPT-BMP's train.py and sample.py, slips included; theirs computes in float16
    paper=LONG | {"sequences": "windows", "batch_size": 40, "lr": 6e-4, "warmup": 200,
                  "temperature": 0.8},
)


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 1 and its data."""
    model = PixelGPT(config.select(PixelGPTConfig)).to(device)
    val = config.dataset("val")
    images = torch.stack([item.image for item in val])
    prompt = model.tokenizer.encode(images[: config.samples])[:, :1]

    def tokens(dataset: Dataset) -> TokenDataset:
        return TokenDataset(dataset, model.tokenizer)

    def evaluate(model: PixelGPT, step: int) -> dict:
        generator = torch.Generator(device).manual_seed(config.seed)
        drawn = model.generate_images(prompt, temperature=config.temperature,
                                      generator=generator).cpu()
        save_grid(drawn, config.out / f"step-{step:05d}.png", columns=config.samples,
                  scale=max(1, 128 // config.size))
        return image_statistics(drawn, images)

    def summarize(model: PixelGPT, last: dict) -> dict:
        bits = last["val_loss"] / math.log(2)
        return {"bits_per_pixel": bits, "bits_per_dimension": bits / 3} | {
            name: last[name] for name in image_statistics(images, images)}

    data = tokens(config.dataset("train"))
    if config.sequences == "windows":
        data = WindowDataset(data, model.length - 1)
    return Task(model=model, data=data, val=tokens(val), loss=next_pixel_loss,
                evaluate=evaluate, summarize=summarize,
                parts_per_image=model.length - 1,
                settings={"sequences": config.sequences})


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("pixelgpt", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(Options):
    """Generate images with a checkpoint of chapter 1."""

    # color to begin with, such as 0xFEC; None: the first pixels of images of `data`
    first_pixel: str | None = None
    top_k: int | None = None  # sample only from this many likeliest colors
    top_p: float | None = None  # sample from the likeliest that sum to this probability


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, None]:
    """Images (B, 3, H, W) in [0, 1] of the model `load(checkpoint)`; labels: None."""
    device = pick_device()
    model = load(checkpoint, PixelGPT).to(device)
    if options.first_pixel is not None:
        count = model.tokenizer.vocab_size
        try:
            color = int(options.first_pixel, 0)
        except ValueError:
            raise ValueError("--first-pixel takes a color as a number, such as 0xFEC, "
                             f"found {options.first_pixel!r}") from None
        if not 0 <= color < count:
            raise ValueError(f"--first-pixel {options.first_pixel} is not a color of "
                             f"this model: expected 0 to {count - 1:#x}")
        prompt = torch.full((options.count, 1), color)
    else:
        val = load_dataset(options.data, model.config.size, "val", options.count)
        first = [model.tokenizer.encode(item.image[None])[:, :1] for item in val]
        prompt = torch.cat(first)[torch.arange(options.count) % len(first)]
    generator = torch.Generator(device).manual_seed(options.seed)
    images = [model.generate_images(
        part, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, generator=generator).cpu() for part in prompt.split(50)]
    return torch.cat(images), None


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write a grid of the images that `draw` returns; return the file."""
    images, _ = draw(checkpoint, options)
    save_grid(images, options.out, scale=options.scale, columns=options.columns)
    return options.out
