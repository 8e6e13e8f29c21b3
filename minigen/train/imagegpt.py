"""Train the GPT over learned tokens of chapter 5, generating images along the way."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Literal, get_type_hints

import torch
from torch import Tensor, nn

from minigen.checkpoints import find_checkpoint, load
from minigen.checks import SHARE, check_numbers
from minigen.codes import CodeDataset, CodeItem, extract_codes, load_tokenizer
from minigen.data import load_dataset
from minigen.devices import is_main_process, join_processes, pick_device
from minigen.imagegpt import ImageGPT, check_tokenizer, next_token_loss
from minigen.pixelgpt import image_statistics
from minigen.runs import TINY, RunConfig, Task, presets, run
from minigen.runs import SampleOptions as Options
from minigen.sampling import Guidance
from minigen.show import save_grid
from minigen.train import vq
from minigen.training import evaluate as mean_loss
from minigen.transformer import TransformerConfig
from minigen.vq import VQModel


@dataclass(kw_only=True)
class Config(RunConfig, TransformerConfig):
    """A run of chapter 5. Every field is an option of the command line."""

    tokenizer: str = ""  # a run, shipped model or LlamaGen .pt; empty: train one first
    codes_in: str = ""  # folder for the codes, which runs can share; empty: `out`
    ten_crop: bool = False  # train on ten crops of each image, as LlamaGen does
    labels: bool = True  # condition the model on the class, if there are several
    class_dropout: float = 0.1  # share of labels left out in training, for guidance
    guidance: float = 2.0  # guidance scale at the evaluations
    # of the guidance scale: constant, or rising from 1 to `guidance` over the tokens
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # position encoding: one vector each, row plus column, rotary over the grid, or none
    positions: Literal["learned", "rowcol", "rope2d", "none"] = "rowcol"
    batch_size: int = 16  # items per batch, over all processes together
    out: Path = Path("runs/imagegpt")  # checkpoint, images and result.json go here

    def __post_init__(self):
        super().__post_init__()  # the model would check this only after the tokenizer
        check_numbers(self, class_dropout=SHARE)


PRESETS = presets(
    Config,
    test=TINY | {"depth": 1, "heads": 2, "dim": 16},
    demo={"train_images": 1000, "precision": "float32"},  # two CPU cores, half a minute
    # 5e14 FLOPs: an hour on one core with bfloat16; 5 MB in float16 set the width
    cpu={"size": 64, "dim": 168, "heads": 6, "depth": 6, "train_images": 40_000,
         "val_images": 1000, "steps": 3800, "batch_size": 32, "lr": 1.5e-3,
         "warmup": 100, "ema": 0.998, "save_every": 200,
         "eval_steps": (100, 400, 1000, 2000, 3800)},
    # chapter 3's shape: the document gives none for this chapter; one GPU
    full={"size": 64, "dim": 512, "heads": 8, "depth": 6, "dropout": 0.1, "ema": 0.999,
          "train_images": 50_000, "val_images": 1000, "steps": 20_000, "batch_size": 64,
          "lr": 1e-3, "warmup": 500, "save_every": 1000,
          "eval_steps": (200, 400, 800, 1600, 3000, 6000, 10_000, 20_000)},
    # LlamaGen-B on ImageNet 256 (arXiv 2406.06525, section 3.1): 16 x 16 tokens, 300
    # epochs of 1.28 million images. Not as published: GPT-2's block and positions (see
    # --norm, --mlp and --positions), a falling learning rate, an output layer that does
    # not start at zero; and a pass over the data has all ten crops of an image instead
    # of one.
    paper={"tokenizer": "vq_ds16_c2i.pt", "data": "imagenet", "size": 256,
           "ten_crop": True, "dim": 768, "heads": 12, "depth": 12, "dropout": 0.1,
           "attention_dropout": 0.0, "weight_decay": 0.05, "train_images": 1_281_167,
           "val_images": 5000, "steps": 1_501_368, "batch_size": 256, "lr": 1e-4,
           "warmup": 1,
           "eval_steps": (1000, 5000, 20_000, 50_000, 100_000, 250_000, 500_000,
                          1_000_000, 1_501_368),
           "save_every": 5000, "workers": 16},
)


def make_codes(config: Config,
               device: torch.device) -> tuple[str, list[CodeDataset]]:
    """The tokenizer's name, and its codes of train and val; made if missing."""
    if not config.train_images:
        raise ValueError("a model of codes needs a number of images whose codes are "
                         "stored: expected train_images above 0, found 0")
    name, folder = config.tokenizer, Path(config.codes_in or config.out)
    if not name:
        name = str(config.out / "tokenizer")
        shared = ("data", "size", "train_images", "val_images", "seed", "resume",
                  "overwrite")
        shared = {field: getattr(config, field) for field in shared}
        vq.main(replace(vq.PRESETS[config.preset], **shared, out=Path(name)))
        join_processes(device).wait_for_everyone()  # until the first has written it
    found = []
    for split, options in (
            ("train", {"length": config.train_images, "ten_crop": config.ten_crop}),
            ("val", {"length": config.val_images, "flip": False})):
        out = folder / f"codes-{split}"
        if config.overwrite and not config.codes_in and is_main_process():
            shutil.rmtree(out, ignore_errors=True)
        found.append(extract_codes(
            name, config.data, out, size=config.size, split=split, seed=config.seed,
            on_error=config.on_error, **options))
    return name, found


def build(config: Config, device: torch.device, kind: type = ImageGPT,
          loss: Callable[[nn.Module, CodeItem], Tensor] = next_token_loss,
          unit: str = "token") -> Task:
    """A model of tokens, of chapter 5 or a later one, and its codes.

    In the image file of a step, the upper row is generated from scratch, one class
    after another, and the lower row completes the top halves of validation images.
    `classes.png` has a row for each of up to sixteen classes. The loss is in nats per
    `unit`.
    """
    name, (train, val) = make_codes(config, device)
    tokenizer = load_tokenizer(name).to(device)
    fingerprint, columns = tokenizer.fingerprint(), config.samples
    classes = len(train.classes) if config.labels and len(train.classes) > 1 else 0
    guidance = Guidance(config.guidance, config.schedule) if classes else None
    images = torch.stack([item.image for item in config.dataset("val")])
    tops = tokenizer.encode(images[:columns, :, : config.size // 2]).flatten(1)
    known = torch.tensor([val[n].label for n in range(len(tops))])
    torch.manual_seed(config.seed)  # even if making the codes used random numbers
    model = kind(config.select(
        get_type_hints(kind.__init__)["config"], codebook_size=tokenizer.codebook_size,
        height=train.grid[0], width=train.grid[1], classes=classes,
        fingerprint=fingerprint, tokenizer=config.tokenizer or "tokenizer")).to(device)

    @wraps(loss)  # which may take a generator
    def without_class(model: nn.Module, batch: CodeItem, **seeded) -> Tensor:
        return loss(model, batch._replace(
            label=torch.full_like(batch.label, classes)), **seeded)

    def draw(model: nn.Module, name: str, *rows: tuple[int | Tensor, Tensor]) -> Tensor:
        generator = torch.Generator(device).manual_seed(config.seed)
        drawn = [model.generate_images(
            tokenizer, prompt, labels if classes else None, guidance=guidance,
            generator=generator).cpu() for prompt, labels in rows]
        save_grid(torch.cat(drawn), config.out / name, columns=columns,
                  scale=max(1, 128 // config.size))
        return drawn[0]

    def evaluate(model: nn.Module, step: int) -> dict:
        labels = torch.arange(columns) % max(1, classes)
        drawn = draw(model, f"step-{step:05d}.png", (columns, labels), (tops, known))
        return image_statistics(drawn, images)

    def seconds(model: nn.Module, **options) -> float:
        start = time.perf_counter()
        model.generate_images(tokenizer, 1, **options)
        return time.perf_counter() - start

    def summarize(model: nn.Module, last: dict) -> dict:
        labels = torch.arange(min(classes, 16) or 1).repeat_interleave(columns)
        draw(model, "classes.png", (len(labels), labels))
        bits = last["val_loss"] / math.log(2)
        metrics = {
            f"bits_per_{unit}": bits, "tokens_per_image": model.length,
            "seconds_per_image": seconds(model), "extra": {"tokenizer": fingerprint},
        } | {name: last[name] for name in image_statistics(images, images)}
        if unit == "token":  # only a likelihood can be summed over the tokens
            metrics["bits_per_pixel"] = bits * model.length / config.size**2
        if classes:
            bits = mean_loss(model, val, without_class, config.batch_size) / math.log(2)
            metrics[f"bits_per_{unit}_without_class"] = bits
            metrics["seconds_per_image_guided"] = seconds(
                model, labels=labels[:1], guidance=Guidance(2.0))
        return metrics

    return Task(model=model, data=train, val=val, loss=loss,
                evaluate=evaluate, summarize=summarize, parts_per_image=model.length)


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("imagegpt", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(Options):
    """Generate images with a checkpoint of chapter 5."""

    tokenizer: str = ""  # as in `train`; empty: the one that belongs to the checkpoint
    start: Literal["nothing", "half"] = "nothing"  # half: complete top halves of `data`
    label: int | None = None  # class of all; None: each in turn, or those of `data`
    guidance: float = 2.0  # guidance scale: 1 is none, 0 ignores the class
    # of the guidance scale: constant, or rising from 1 to `guidance`
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    top_k: int | None = None  # sample only from this many likeliest tokens
    top_p: float | None = None  # sample from the likeliest that sum to this probability


def find_tokenizer(checkpoint: str | Path, model: nn.Module) -> VQModel:
    """A model's tokenizer: in its checkpoint, beside it, shipped, or on the hub.

    The name comes with the checkpoint, perhaps from a stranger, so it may not lead
    anywhere else.
    """
    name, folder = model.config.tokenizer, find_checkpoint(checkpoint).resolve()
    last, places = Path(name).name, []
    if name and not Path(name).is_absolute() and ".." not in Path(name).parts:
        places.append(folder / name)
    if last not in ("", ".."):
        places += [folder.parent / last, last]
    if name.count("/") == 1 and not Path(name).exists():
        places.append(name)  # OWNER/NAME
    for place in places:
        try:
            return load_tokenizer(place)
        except OSError:  # not there
            continue
    raise FileNotFoundError(
        f"no tokenizer {name} in {folder}, beside it, among those that ship, or on the "
        f"hub: pass the one with fingerprint {model.config.fingerprint} with "
        "--tokenizer")


def tokenizer_of(checkpoint: str | Path, model: nn.Module,
                 options: SampleOptions) -> VQModel:
    """The tokenizer of the options, else the model's; ValueError if it does not fit."""
    tokenizer = (load_tokenizer(options.tokenizer) if options.tokenizer
                 else find_tokenizer(checkpoint, model))
    check_tokenizer(model, tokenizer)
    return tokenizer


def draw(checkpoint: str, options: SampleOptions, kind: type = ImageGPT,
         **more) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in [0, 1] of the model `load(checkpoint)`, and their labels.

    The labels (B,) are those given to the model, or None if it knows no classes. `more`
    are further options of the sampler, for the models of later chapters.
    """
    device, count = pick_device(), options.count
    model = load(checkpoint, kind).to(device)
    tokenizer = tokenizer_of(checkpoint, model, options).to(device)
    tops, labels = None, torch.arange(count) % max(1, model.config.classes)
    if options.start == "half":
        side = model.config.height * tokenizer.config.downsample
        val = load_dataset(options.data, side, "val", count)
        chosen = [val[n % len(val)] for n in range(count)]  # a small folder repeats
        tops = torch.stack([item.image for item in chosen])[:, :, : side // 2]
        tops = tokenizer.encode(tops).flatten(1)
        labels = torch.tensor([item.label for item in chosen])
    if options.label is not None:
        labels = torch.full((count,), options.label)
    elif not model.config.classes:
        labels = None
    guidance = Guidance(options.guidance, options.schedule)
    guidance = None if labels is None else guidance
    generator = torch.Generator(device).manual_seed(options.seed)
    images = []
    for part in torch.arange(count).split(100):  # so that the cache fits in memory
        images.append(model.generate_images(
            tokenizer, len(part) if tops is None else tops[part],
            None if labels is None else labels[part], top_k=options.top_k,
            top_p=options.top_p, temperature=options.temperature,
            guidance=guidance, generator=generator, **more).cpu())
    return torch.cat(images), labels


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write a grid of the images that `draw` returns; return the file."""
    images, _ = draw(checkpoint, options)
    return save_samples(images, options)


def save_samples(images: Tensor, options: Options) -> Path:
    """Write a grid of images (B, 3, H, W) to `options.out`; return the file."""
    save_grid(images, options.out, scale=options.scale, columns=options.columns)
    return options.out
