"""Train the GPT over patches of chapter 3, drawing pictures along the way."""

import math
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minigen.data import load_dataset
from minigen.patchgpt import PatchGPT, PatchGPTConfig, drift, next_patch_error, next_patch_loss
from minigen.pixelgpt import neighbour_correlation, row_statistics_distance
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
    """A run of chapter 3. Every field can be set on the command line; the rest is the preset's."""

    size: int = 16  # side of the square pictures, in pixels
    patch_size: int = 4  # side of a patch, in pixels
    head: Literal["mse", "gaussian", "logistic"] = "logistic"  # a single guess, or a distribution to draw from
    mixtures: int = 5  # components of the distribution
    neighbours: bool = True  # logistic: a pixel sees the ones on its left and above, also across the border of the patch
    above: bool = True  # a place reads the patch above the one to come, too, and not only the last one
    noise: float = 0.0  # most noise on the patches read in training: standard deviation, pixels being in [0, 1]
    positions: Literal["learned", "rowcol"] = "rowcol"  # one vector a place, or one for its row and one for its column
    depth: int = 4  # blocks
    heads: int = 4  # attention heads
    dim: int = 128  # width
    dropout: float = 0.0  # share of activations left out in training
    out: Path = Path("runs/patchgpt")  # checkpoint, pictures and result.json go here


# The document's width, heads, layers and patch. It names neither data nor steps nor rate; those are ours.
LARGE = dict(size=64, dim=512, heads=8, depth=6, train_images=50_000, val_images=1000, steps=10_000, batch_size=64, warmup=500,
             sample_at=(200, 400, 800, 1600, 3000, 6000, 10_000), save_every=500)

PRESETS = {
    "test": Config("test", size=16, depth=1, heads=2, dim=16, mixtures=2, train_images=16, val_images=8, steps=3, batch_size=4, warmup=1,
                   sample_at=(1, 3), samples=4, save_every=1),
    # two CPU cores, a quarter of a minute; to make bfloat16 of so little takes longer than it saves
    "demo": Config("demo", precision="float32"),
    "cpu": Config("cpu", size=64, train_images=12_000, val_images=256, steps=5000, lr=2e-3, warmup=100, ema=0.995,
                  sample_at=(50, 100, 200, 400, 800, 1600, 3000, 5000), save_every=200),  # one CPU core, half an hour
    "full": Config("full", **LARGE, lr=1e-3, ema=0.999),  # one GPU
    "paper": Config("paper", **LARGE, lr=3e-4, head="mse", above=False, positions="learned"),  # the document's model, its slips mended
}


def main(config: Config) -> dict:
    """Train, write the checkpoint, the pictures and `result.json` to `config.out`, and return the result.

    Of several processes the first one evaluates, draws and writes; the others return an empty result. The upper row of a
    picture is drawn from nothing, the lower one continues the top halves of validation pictures.
    """
    torch.manual_seed(config.seed)
    device = pick_device()
    model = PatchGPT(PatchGPTConfig(
        config.size, config.size, config.patch_size, config.head, config.mixtures, config.neighbours, config.above, config.noise,
        config.positions, config.depth, config.heads, config.dim, config.dropout,
    )).to(device)
    average = deepcopy(model) if config.ema else None
    drawn = model if average is None else average  # the one to evaluate, to draw with and to keep
    val = config.dataset("val", config.size)
    val_images = torch.stack([item.image for item in val])
    tops = model.encode(val_images[: config.samples])[:, : model.length // 2]

    records = fit(model, config.dataset("train", config.size), next_patch_loss, config.recipe(), average=average, folder=config.out,
                  resume=config.resume, settings={"data": config.data})
    patches_per_step = config.batch_size * config.accumulate * model.length
    for record in progress(records, config.steps, patches_per_step, f"patchgpt {config.preset} {config.head}"):
        if record.look and is_main_process():
            generator = torch.Generator(device).manual_seed(config.seed)
            images = drawn.draw(len(tops), generator=generator).cpu()
            completed = drawn.draw(tops, generator=generator).cpu()
            save_grid(torch.cat([images, completed]), config.out / f"step-{record.step:05d}.png", columns=len(tops),
                      scale=max(1, 128 // config.size))
            save_checkpoint(drawn, config.out)
            along_rows, along_columns = neighbour_correlation(images)
            record.metrics.update(
                val_loss=evaluate(drawn, val, next_patch_loss, config.batch_size),
                val_error=255 * evaluate(drawn, val, next_patch_error, config.batch_size) ** 0.5,
                row_statistics_distance=row_statistics_distance(images, val_images),
                correlation_along_rows=along_rows, correlation_along_columns=along_columns,
            )
    if not is_main_process():
        return {}

    forced, free = drift(drawn, val_images[:64], len(tops[0]), torch.Generator(device).manual_seed(config.seed))
    start = time.perf_counter()
    drawn.draw(1, generator=torch.Generator(device).manual_seed(config.seed))
    seconds_per_picture = time.perf_counter() - start
    last = read_log(config.out)[-1]
    likelihood = {} if config.head == "mse" else {"bits_per_dimension": last["val_loss"] / math.log(2)}
    return finish_run("patchgpt", config, PRESETS, likelihood | {
        "val_loss": last["val_loss"], "error_in_levels": last["val_error"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "patches_per_second": config.steps * patches_per_step / last["seconds"],
        "seconds_per_picture": seconds_per_picture,
        "correlation_along_rows": last["correlation_along_rows"], "correlation_along_columns": last["correlation_along_columns"],
    }, drift={"after_real_patches": forced.tolist(), "after_drawn_patches": free.tolist()})


@dataclass
class SampleOptions:
    """Pictures drawn by a checkpoint of chapter 3."""

    start: Literal["nothing", "patch", "half"] = "nothing"  # what is given: nothing, or of pictures of `data` a patch or the top half
    data: str = "landscapes"  # a data set's name, or a folder of pictures
    count: int = 16  # how many pictures
    temperature: float = 1.0  # below 1 keeps to what is likely, 0 takes the likeliest
    seed: int = 0
    columns: int | None = None  # pictures beside each other; without it, about as many as below each other
    scale: int = 4  # pixels on the file for each pixel of a picture
    out: Path = Path("samples.png")


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Draw a grid of pictures with the model in `checkpoint` (a folder, or a name on the Hugging Face hub)."""
    device = pick_device()
    model = load_checkpoint(PatchGPT, checkpoint).to(device)
    prompt = options.count
    if options.start != "nothing":
        given = 1 if options.start == "patch" else model.length // 2
        val = load_dataset(options.data, model.config.height, "val", options.count)
        beginnings = model.encode(torch.stack([item.image for item in val]))[:, :given]
        prompt = beginnings[torch.arange(options.count) % len(beginnings)]  # a small folder gives each of its pictures again
    generator = torch.Generator(device).manual_seed(options.seed)
    images = model.draw(prompt, temperature=options.temperature, generator=generator)
    save_grid(images.cpu(), options.out, scale=options.scale, columns=options.columns)
    return options.out
