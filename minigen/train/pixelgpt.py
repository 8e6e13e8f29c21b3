"""Train the GPT over pixels of chapter 1, drawing pictures along the way."""

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset

from minigen.data import load_dataset
from minigen.pixelgpt import (
    PixelGPT,
    PixelGPTConfig,
    TokenDataset,
    WindowDataset,
    neighbour_correlation,
    next_pixel_loss,
    row_statistics_distance,
)
from minigen.show import save_grid
from minigen.training import (
    RunConfig,
    evaluate,
    finish_run,
    fit,
    is_main_process,
    load_checkpoint,
    pick_device,
    progress,
    read_log,
    save_checkpoint,
)


@dataclass
class Config(RunConfig):
    """A run of chapter 1. Every field can be set on the command line; the rest is the preset's."""

    size: int = 16  # side of the square pictures, in pixels
    bits: int = 4  # bits kept of each channel; 4 give 4096 colours
    positions: Literal["learned", "rowcol"] = "learned"  # one vector a place, or one for its row and one for its column
    sequences: Literal["pictures", "windows"] = "pictures"  # windows: pieces one pixel short, as published
    depth: int = 4  # blocks
    heads: int = 4  # attention heads
    dim: int = 128  # width
    dropout: float = 0.0  # share of activations left out in training
    train_images: int = 400  # how many pictures to draw or read for training
    steps: int = 50  # optimizer steps
    lr: float = 4e-3  # highest learning rate
    warmup: int = 10  # steps until it is reached
    sample_at: tuple[int, ...] = (5, 12, 25, 50)  # steps after which to evaluate and draw
    save_every: int = 25  # steps between the states from which a run that was stopped can go on
    out: Path = Path("runs/pixelgpt")  # checkpoint, pictures and result.json go here


# The published pictures were drawn after these many steps of the published run.
PUBLISHED_STEPS = (200, 400, 800, 1600, 3000, 6000, 10_000)
LARGE = dict(size=64, train_images=50_000, val_images=1000, steps=10_000, batch_size=16, lr=1e-3, warmup=100,
             sample_at=PUBLISHED_STEPS, save_every=500)

PRESETS = {
    "test": Config("test", size=16, depth=1, heads=2, dim=16, train_images=16, val_images=8, steps=3, batch_size=4, warmup=1,
                   sample_at=(1, 3), samples=4, save_every=1),
    "demo": Config("demo"),  # two CPU cores, half a minute
    "cpu": Config("cpu", size=24, train_images=12_000, val_images=256, steps=1500, batch_size=8, lr=3e-3, warmup=50, ema=0.99,
                  sample_at=(25, 50, 100, 200, 400, 800, 1500), samples=12, save_every=100),  # one CPU core, half an hour
    "full": Config("full", **LARGE, ema=0.999),  # one GPU
    "paper": Config("paper", **LARGE, sequences="windows"),  # the published run, slips included
}


def sequences(config: Config, model: PixelGPT) -> Dataset:
    """The training data as tokens (T,): whole pictures, or windows as the published run cut them."""
    tokens = TokenDataset(config.dataset("train", config.size), model.tokenizer)
    return WindowDataset(tokens, config.size**2 - 1) if config.sequences == "windows" else tokens


def main(config: Config) -> dict:
    """Train, write the checkpoint, the pictures and `result.json` to `config.out`, and return the result.

    Of several processes the first one evaluates, draws and writes; the others return an empty result.
    """
    torch.manual_seed(config.seed)
    device = pick_device()
    model = PixelGPT(PixelGPTConfig(config.size, config.bits, config.positions, config.depth, config.heads, config.dim,
                                    config.dropout)).to(device)
    average = deepcopy(model) if config.ema else None
    drawn = model if average is None else average  # the one to evaluate, to draw with and to keep
    val = config.dataset("val", config.size)
    val_images = torch.stack([item.image for item in val])
    prompt = model.tokenizer.encode(val_images[: config.samples])[:, :1]  # their first pixels

    records = fit(model, sequences(config, model), next_pixel_loss, config.recipe(), average=average, folder=config.out,
                  resume=config.resume, settings={"data": config.data, "sequences": config.sequences})
    tokens_per_step = config.batch_size * config.accumulate * (config.size**2 - 1)
    for record in progress(records, config.steps, tokens_per_step, f"pixelgpt {config.preset}"):
        if record.look and is_main_process():
            generator = torch.Generator(device).manual_seed(config.seed)
            images = drawn.draw(prompt, generator=generator).cpu()
            save_grid(images, config.out / f"step-{record.step:05d}.png", columns=config.samples, scale=max(1, 128 // config.size))
            save_checkpoint(drawn, config.out)
            along_rows, along_columns = neighbour_correlation(images)
            record.metrics.update(
                val_loss=evaluate(drawn, TokenDataset(val, model.tokenizer), next_pixel_loss, config.batch_size),
                row_statistics_distance=row_statistics_distance(images, val_images),
                correlation_along_rows=along_rows, correlation_along_columns=along_columns,
            )
    if not is_main_process():
        return {}

    last = read_log(config.out)[-1]
    bits = last["val_loss"] / math.log(2)
    return finish_run("pixelgpt", config, PRESETS, {
        "val_loss": last["val_loss"], "bits_per_pixel": bits, "bits_per_dimension": bits / 3,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": config.steps * tokens_per_step / last["seconds"],
        "correlation_along_rows": last["correlation_along_rows"], "correlation_along_columns": last["correlation_along_columns"],
    })


@dataclass
class SampleOptions:
    """Pictures drawn by a checkpoint of chapter 1."""

    first_pixel: str | None = None  # first colour of every picture, such as 0xFEC; without it, first colours of `data`
    data: str = "landscapes"  # a data set's name, or a folder of pictures
    count: int = 16  # how many pictures
    temperature: float = 1.0  # below 1 keeps to likely colours, 0 takes the likeliest
    top_k: int | None = None  # draw among this many likeliest colours
    top_p: float | None = None  # draw among the fewest colours with this much probability
    seed: int = 0
    columns: int | None = None  # pictures beside each other; without it, about as many as below each other
    scale: int = 4  # pixels on the file for each pixel of a picture
    out: Path = Path("samples.png")


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Draw a grid of pictures with the model in `checkpoint` (a folder, or a name on the Hugging Face hub)."""
    device = pick_device()
    model = load_checkpoint(PixelGPT, checkpoint).to(device)
    if options.first_pixel is not None:
        color = int(options.first_pixel, 0)
        if not 0 <= color < model.tokenizer.vocab_size:
            raise ValueError(f"--first-pixel {options.first_pixel} is not a colour of this model, which has colours "
                             f"0 to {model.tokenizer.vocab_size - 1:#x}")
        prompt = torch.full((options.count, 1), color)
    else:
        val = load_dataset(options.data, model.config.size, "val", options.count)
        first = torch.cat([model.tokenizer.encode(item.image[None])[:, :1] for item in val])
        prompt = first[torch.arange(options.count) % len(first)]  # a small folder gives each of its colours again
    generator = torch.Generator(device).manual_seed(options.seed)
    images = model.draw(prompt, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                        generator=generator)
    save_grid(images.cpu(), options.out, scale=options.scale, columns=options.columns)
    return options.out
