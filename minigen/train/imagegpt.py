"""Train the GPT over learned tokens of chapter 5, drawing pictures along the way."""

import math
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigen.codes import CodeDataset, CodeItem, extract_codes
from minigen.data import load_dataset
from minigen.imagegpt import Guidance, ImageGPT, ImageGPTConfig, check_tokenizer, next_token_loss
from minigen.pixelgpt import neighbour_correlation, row_statistics_distance
from minigen.show import save_grid
from minigen.train import vq
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
    start_accelerator,
)
from minigen.vq import VQModel, load_tokenizer


@dataclass
class Config(RunConfig):
    """A run of chapter 5. Every field can be set on the command line; the rest is the preset's."""

    tokenizer: str = ""  # of chapter 4: a folder, a name on the hub, a file of LlamaGen's; empty: one is trained first, in `out`
    codes_in: str = ""  # folder of the extracted codes, which several runs may share; empty: in `out`
    ten_crop: bool = False  # extract the codes of ten crops of each training picture, as LlamaGen does, not only of the whole
    size: int = 32  # side of the square pictures, in pixels
    labels: bool = True  # tell the model the class of a picture, where the data set has classes
    drop_label: float = 0.1  # share of the labels left out in training, for guidance
    guidance: float = 2.0  # scale with which the pictures along the way are drawn
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of that scale over the places of a picture
    positions: Literal["learned", "rowcol"] = "rowcol"  # one vector a place, or one for its row and one for its column
    depth: int = 4  # blocks
    heads: int = 4  # attention heads
    dim: int = 128  # width
    dropout: float = 0.0  # share of activations left out in training
    weight_decay: float = 0.1  # on matrices only
    batch_size: int = 16  # pictures a batch, over all processes together
    out: Path = Path("runs/imagegpt")  # checkpoint, pictures and result.json go here


PRESETS = {
    "test": Config("test", size=16, depth=1, heads=2, dim=16, train_images=16, val_images=8, steps=3, batch_size=4, warmup=1,
                   sample_at=(1, 3), samples=4, save_every=1),
    "demo": Config("demo", train_images=1000, precision="float32"),  # two CPU cores, half a minute, and as long for the tokenizer
    "cpu": Config("cpu", size=64, train_images=12_000, val_images=256, steps=3000, warmup=100, ema=0.995,
                  sample_at=(50, 100, 200, 400, 800, 1600, 3000), save_every=250),  # one CPU core, a quarter of an hour with 256 tokens
    # the width, heads and depth of chapter 3's document; that of this chapter names none
    "full": Config("full", size=64, dim=512, heads=8, depth=6, dropout=0.1, train_images=50_000, val_images=1000, steps=20_000,
                   batch_size=64, lr=1e-3, warmup=500, ema=0.999, sample_at=(200, 400, 800, 1600, 3000, 6000, 10_000, 20_000),
                   save_every=1000),  # one GPU
    # LlamaGen-B on ImageNet 256 (arXiv 2406.06525, section 3.1): 16 x 16 tokens, 300 epochs of 1.28 million pictures. Not as
    # published: GPT-2's block and positions (RMSNorm, SwiGLU and rotary positions come in chapter 7), a rate that falls, an
    # initialised output layer, no dropout of whole tokens; and an epoch sees each of the crops instead of one in ten
    "paper": Config("paper", tokenizer="vq_ds16_c2i.pt", data="imagenet", size=256, ten_crop=True, dim=768, heads=12, depth=12,
                    dropout=0.1, weight_decay=0.05, train_images=1_281_167, val_images=5000, steps=1_501_368, batch_size=256, lr=1e-4,
                    warmup=1, sample_at=(1000, 5000, 20_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 1_501_368),
                    save_every=5000, workers=16),
}


def tokens_of(config: Config) -> tuple[VQModel, CodeDataset, CodeDataset]:
    """The tokenizer, and the codes of training and validation pictures: trained and extracted where they are not there yet."""
    name = config.tokenizer or str(config.out / "tokenizer")
    if not config.tokenizer and not (config.resume and (config.out / "tokenizer/result.json").exists()):
        preset = vq.PRESETS[config.preset]
        shared = {field: getattr(config, field) for field in ("data", "size", "train_images", "val_images", "seed", "resume")}
        vq.main(replace(preset, **shared, out=config.out / "tokenizer"))
    with start_accelerator(pick_device()).main_process_first():  # the others find all of it there
        folder = Path(config.codes_in or config.out)
        shared = dict(tokenizer=name, data=config.data, size=config.size, seed=config.seed)
        train = extract_codes(out=folder / "codes-train", split="train", length=config.train_images, ten_crop=config.ten_crop, **shared)
        val = extract_codes(out=folder / "codes-val", split="val", length=config.val_images, flip=False, **shared)
    return load_tokenizer(name), train, val


def without_class(model: ImageGPT, batch: CodeItem) -> Tensor:
    """`next_token_loss` of a model that is not told the classes."""
    return next_token_loss(model, batch._replace(label=torch.full_like(batch.label, model.config.classes)))


def main(config: Config) -> dict:
    """Train, write the checkpoint, the pictures and `result.json` to `config.out`, and return the result.

    Of several processes the first one evaluates, draws and writes; the others return an empty result. The upper row of a
    picture is drawn from nothing, one class after the other, the lower one continues the top halves of validation pictures.
    `classes.png` has a row for each class, of at most sixteen.
    """
    device = pick_device()
    tokenizer, train, val = tokens_of(config)
    tokenizer = tokenizer.to(device)
    classes = len(train.classes) if config.labels and len(train.classes) > 1 else 0
    torch.manual_seed(config.seed)
    model = ImageGPT(ImageGPTConfig(
        codes=tokenizer.codes, height=train.grid[0], width=train.grid[1], classes=classes, drop_label=config.drop_label,
        positions=config.positions, depth=config.depth, heads=config.heads, dim=config.dim, dropout=config.dropout,
        tokenizer=config.tokenizer or "tokenizer", fingerprint=tokenizer.fingerprint(),
    )).to(device)
    average = deepcopy(model) if config.ema else None
    drawn = model if average is None else average  # the one to evaluate, to draw with and to keep
    guidance = Guidance(config.guidance, config.schedule) if classes else Guidance()
    val_images = torch.stack([item.image for item in config.dataset("val", config.size)])
    tops = tokenizer.encode(val_images[: config.samples, :, : config.size // 2]).flatten(1)
    asked = torch.arange(config.samples) % max(1, classes) if classes else None
    known = torch.tensor([val[n].label for n in range(len(tops))]) if classes else None

    records = fit(model, train, next_token_loss, config.recipe(), average=average, folder=config.out, resume=config.resume,
                  settings={"data": config.data})
    tokens_per_step = config.batch_size * config.accumulate * model.length
    for record in progress(records, config.steps, tokens_per_step, f"imagegpt {config.preset}"):
        if record.look and is_main_process():
            generator = torch.Generator(device).manual_seed(config.seed)
            images = drawn.draw(tokenizer, config.samples, asked, guidance=guidance, generator=generator).cpu()
            completed = drawn.draw(tokenizer, tops, known, guidance=guidance, generator=generator).cpu()
            save_grid(torch.cat([images, completed]), config.out / f"step-{record.step:05d}.png", columns=len(images),
                      scale=max(1, 128 // config.size))
            save_checkpoint(drawn, config.out)
            along_rows, along_columns = neighbour_correlation(images)
            record.metrics.update(
                val_loss=evaluate(drawn, val, next_token_loss, config.batch_size),
                row_statistics_distance=row_statistics_distance(images, val_images),
                correlation_along_rows=along_rows, correlation_along_columns=along_columns,
            )
    if not is_main_process():
        return {}

    rows = torch.arange(min(classes, 16) or 1).repeat_interleave(config.samples)
    generator = torch.Generator(device).manual_seed(config.seed)
    images = drawn.draw(tokenizer, len(rows), rows if classes else None, guidance=guidance, generator=generator).cpu()
    save_grid(images, config.out / "classes.png", columns=config.samples, scale=max(1, 128 // config.size))

    def seconds(labels: Tensor | None, guidance: Guidance) -> float:
        start = time.perf_counter()
        drawn.draw(tokenizer, 1, labels, guidance=guidance, generator=torch.Generator(device).manual_seed(config.seed))
        return time.perf_counter() - start

    last = read_log(config.out)[-1]
    bits = last["val_loss"] / math.log(2)
    metrics = {
        "val_loss": last["val_loss"], "bits_per_token": bits, "bits_per_pixel": bits * model.length / config.size**2,
        "tokens_per_image": model.length, "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": config.steps * tokens_per_step / last["seconds"], "seconds_per_picture": seconds(None, Guidance()),
        "correlation_along_rows": last["correlation_along_rows"], "correlation_along_columns": last["correlation_along_columns"],
    }
    if classes:
        metrics["bits_per_token_without_class"] = evaluate(drawn, val, without_class, config.batch_size) / math.log(2)
        metrics["seconds_per_picture_guided"] = seconds(torch.zeros(1, dtype=torch.int64), Guidance(2.0))
    return finish_run("imagegpt", config, PRESETS, metrics, tokenizer=model.config.fingerprint)


@dataclass
class SampleOptions:
    """Pictures drawn by a checkpoint of chapter 5."""

    tokenizer: str = ""  # a folder or a name on the hub; empty: in the checkpoint's folder, beside it, or where it was in training
    start: Literal["nothing", "half"] = "nothing"  # what is given: nothing, or the top half of pictures of `data`
    data: str = "landscapes"  # a data set's name, or a folder of pictures
    label: int | None = None  # class of every picture; without it, one class after the other, or those of the pictures of `data`
    guidance: float = 1.0  # how much more of the class than the model says: 1 is none, 0 forgets the class
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the guidance: rising ones begin at 1
    count: int = 16  # how many pictures
    temperature: float = 1.0  # below 1 keeps to likely tokens, 0 takes the likeliest
    top_k: int | None = None  # draw among this many likeliest tokens
    top_p: float | None = None  # draw among the fewest tokens with this much probability
    seed: int = 0
    columns: int | None = None  # pictures beside each other; without it, about as many as below each other
    scale: int = 4  # pixels on the file for each pixel of a picture
    out: Path = Path("samples.png")


def find_tokenizer(checkpoint: str, model: ImageGPT) -> VQModel:
    """The tokenizer of a model: in the folder of its checkpoint, beside it, or where it was in training. FileNotFoundError."""
    name, folder = model.config.tokenizer, Path(checkpoint)
    for place in (folder / name, folder.parent / Path(name).name, Path(name)):
        if name and ((place / "config.json").exists() or place.is_file()):
            return load_tokenizer(str(place))
    raise FileNotFoundError(f"there is no tokenizer {name or 'tokenizer'} in {folder}, beside it or here: say where the one that "
                            f"{model.config.fingerprint or 'its codes'} came from lies, by --tokenizer")


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Draw a grid of pictures with the model in `checkpoint` (a folder, or a name on the Hugging Face hub)."""
    device = pick_device()
    model = load_checkpoint(ImageGPT, checkpoint).to(device)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint, model)
    tokenizer = tokenizer.to(device)
    check_tokenizer(model, tokenizer)
    prompt, classes = options.count, model.config.classes
    labels = torch.arange(options.count) % classes if classes else None
    if options.start == "half":
        val = load_dataset(options.data, model.config.height * tokenizer.config.downsample, "val", options.count)
        chosen = torch.arange(options.count) % len(val)  # a small folder gives each of its pictures again
        images = torch.stack([item.image for item in val])
        prompt = tokenizer.encode(images[:, :, : images.shape[2] // 2]).flatten(1)[chosen]
        labels = torch.tensor([item.label for item in val])[chosen] if classes else None
    if options.label is not None:
        labels = torch.full((options.count,), options.label)
    images = model.draw(tokenizer, prompt, labels, guidance=Guidance(options.guidance, options.schedule),
                        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                        generator=torch.Generator(device).manual_seed(options.seed))
    save_grid(images.cpu(), options.out, scale=options.scale, columns=options.columns)
    return options.out
