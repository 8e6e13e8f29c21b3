"""Train chapter 9's model of captions and images, generating images along the way."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from minigen.anytoany import (
    AnyToAny,
    CaptionedCodes,
    caption_scores,
    complete_all,
    direction_loss,
    mixed_loss,
    train_text_tokenizer,
)
from minigen.checkpoints import load
from minigen.codes import load_tokenizer
from minigen.data import load_dataset, read_square, to_item
from minigen.devices import pick_device
from minigen.pixelgpt import image_statistics
from minigen.runs import TINY, RunConfig, Task, presets, run
from minigen.runs import SampleOptions as Options
from minigen.sampling import Guidance
from minigen.show import save_grid
from minigen.train import imagegpt
from minigen.training import evaluate as mean_loss
from minigen.transformer import TransformerConfig

MANY = 100  # sequences generated at a time, so that their cache fits in memory


@dataclass(kw_only=True)
class Config(RunConfig, TransformerConfig):
    """A run of chapter 9. Every field is an option of the command line."""

    tokenizer: str = ""  # of images, as in chapter 5; empty: train one first
    codes_in: str = ""  # folder for the codes, which runs can share; empty: `out`
    ten_crop: bool = False  # train on ten crops of each image
    text_tokens: int = 512  # largest vocabulary of the text tokenizer, at least 256
    length: int = 192  # tokens in the longest sequence
    qk_norm: bool = True  # normalize queries and keys, as Chameleon does
    positions: str = "none"  # none or learned, besides those that the model adds
    text_weight: float = 1.0  # weight of a text token or mark in the loss
    image_weight: float = 1.0  # weight of an image token in the loss
    z_loss: float = 1e-5  # weight of (log Z)^2 in the training loss
    text_first: float = 0.45  # share of images that come after their caption
    image_first: float = 0.35  # share before their caption; the rest are inside it
    pairs: float = 0.25  # share of batches whose sequences have two images each
    text_dropout: float = 0.1  # share of images trained without the text before them
    guidance: float = 2.0  # guidance scale at the evaluations
    batch_size: int = 16  # images per batch, over all processes together
    out: Path = Path("runs/anytoany")  # checkpoint, images and result.json go here


PRESETS = presets(
    Config,
    test=TINY | {"depth": 1, "heads": 2, "dim": 16, "text_tokens": 300},
    demo={"train_images": 1000, "precision": "float32"},
    # 5e14 FLOPs, and 4 MB in half precision
    cpu={"size": 64, "tokenizer": "vq-cpu-tokens64", "dim": 144, "heads": 4,
         "depth": 6, "train_images": 40_000, "val_images": 1000, "steps": 9000,
         "batch_size": 64, "lr": 2e-3, "warmup": 100, "ema": 0.999, "save_every": 500,
         "eval_steps": (500, 2000, 4500, 9000)},
    # chapter 5's shape; one GPU
    full={"size": 64, "tokenizer": "vq-cpu-tokens64", "dim": 512, "heads": 8,
          "depth": 6, "dropout": 0.1, "ema": 0.999,
          "train_images": 50_000, "val_images": 1000, "steps": 20_000, "batch_size": 64,
          "lr": 1e-3, "warmup": 500, "save_every": 1000,
          "eval_steps": (200, 1000, 5000, 20_000)},
)


def captions_of(dataset: Dataset) -> list[str]:
    """The captions of a data set of `Item`, without reading images where possible."""
    if hasattr(dataset, "captions"):
        return list(dataset.captions)
    if hasattr(dataset, "records"):
        return [caption for _, _, caption, _ in dataset.records]
    return [item.caption for item in dataset]


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 9, its codes and captions.

    In the image file of a step, the upper row is generated from validation captions,
    and the lower row completes the top halves of their images, given the captions.
    """
    name, (train_codes, val_codes) = imagegpt.make_codes(config, device)
    tokenizer = load_tokenizer(name).to(device)
    columns = config.samples
    captions = {split: captions_of(config.dataset(split)) for split in ("train", "val")}
    text = train_text_tokenizer(captions["train"], config.text_tokens)
    torch.manual_seed(config.seed)  # even if making the codes used random numbers
    model = AnyToAny(config.select(
        get_type_hints(AnyToAny.__init__)["config"], text=text.to_str(),
        codebook_size=tokenizer.codebook_size, height=train_codes.grid[0],
        width=train_codes.grid[1], fingerprint=tokenizer.fingerprint(),
        tokenizer=config.tokenizer or "tokenizer")).to(device)
    train, val = (CaptionedCodes(codes, captions[split], text) for split, codes in (
        ("train", train_codes), ("val", val_codes)))
    images = torch.stack([item.image for item in config.dataset("val")])

    def evaluate(model: nn.Module, step: int) -> dict:
        generator = torch.Generator(device).manual_seed(config.seed)
        given, tops = captions["val"][:columns], images[:columns, :, : config.size // 2]
        drawn = [draw_images(model, tokenizer, prompts, generator=generator,
                             guidance=Guidance(config.guidance))
                 for prompts in (zip(given), zip(given, tops, strict=True))]
        save_grid(torch.cat(drawn), config.out / f"step-{step:05d}.png",
                  columns=columns, scale=max(1, 128 // config.size))
        bits = {f"bits_of_{to.replace(' ', '_')}": mean_loss(
                    model, val, partial(direction_loss, to=to), config.batch_size)
                / math.log(2) for to in ("image", "image alone", "text")}
        return image_statistics(drawn[0], images) | bits

    def summarize(model: nn.Module, last: dict) -> dict:
        names = [*image_statistics(images, images),
                 *(name for name in last if name.startswith("bits_of_"))]
        generator = torch.Generator(device).manual_seed(config.seed)
        shown = list(images[:MANY])
        written = write_captions(model, tokenizer, shown, generator=generator)
        return {name: last[name] for name in names} | {
            "text_tokens": model.first_code,
            **caption_scores(captions["val"][:MANY], written),
            "extra": {"tokenizer": tokenizer.fingerprint()}}

    return Task(model=model, data=train, val=val, loss=mixed_loss, evaluate=evaluate,
                summarize=summarize, parts="tokens",
                parts_per_image=model.per_image)


def draw_images(model: nn.Module, tokenizer: nn.Module, prompts: Iterable[Iterable],
                **options) -> Tensor:
    """Images (B, 3, H, W) that follow or complete B lists of texts and images."""
    prompts = [list(parts) for parts in prompts]
    lists = [parts for n in range(0, len(prompts), MANY) for parts in complete_all(
        model, tokenizer, prompts[n : n + MANY], "image", **options)]
    return torch.stack([parts[-1] for parts in lists])


def write_captions(model: nn.Module, tokenizer: nn.Module, images: list[Tensor],
                   **options) -> list[str]:
    """A caption for each image (3, H, W) in [0, 1]; empty if the model writes none."""
    lists = [parts for n in range(0, len(images), MANY) for parts in complete_all(
        model, tokenizer, [[image] for image in images[n : n + MANY]], "text",
        **options)]
    return ["".join(part for part in parts if isinstance(part, str)).strip()
            for parts in lists]


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("anytoany", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(Options):
    """Generate images from captions, or write a caption, with a model of chapter 9."""

    tokenizer: str = ""  # as in `train`; empty: the one that belongs to the checkpoint
    # caption of the images; empty: captions of `data`; with `image`, text before it
    text: str = ""
    image: Path | None = None  # instead, write a caption for this image file
    guidance: float = 2.0  # guidance scale for the text: 1 is none
    top_k: int | None = None  # sample only from this many likeliest tokens
    top_p: float | None = None  # sample from the likeliest that sum to this probability


def load_both(checkpoint: str, options: SampleOptions) -> tuple[AnyToAny, nn.Module]:
    """The model that `load(checkpoint)` finds, and its image tokenizer."""
    device = pick_device()
    model = load(checkpoint, AnyToAny).to(device)
    return model, imagegpt.tokenizer_of(checkpoint, model, options).to(device)


def drawing(options: SampleOptions) -> dict:
    """The options of the sampler, from those of the command."""
    generator = torch.Generator(pick_device()).manual_seed(options.seed)
    return {"temperature": options.temperature, "top_k": options.top_k,
            "top_p": options.top_p, "guidance": Guidance(options.guidance),
            "generator": generator}


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) of one text, or of validation captions with labels (B,)."""
    model, tokenizer = load_both(checkpoint, options)
    size = model.config.height * tokenizer.config.downsample
    texts, labels = [options.text] * options.count, None
    if not options.text:
        val = load_dataset(options.data, size, "val", options.count)
        chosen = [val[n % len(val)] for n in range(options.count)]
        texts = [item.caption for item in chosen]
        labels = torch.tensor([item.label for item in chosen])
    return draw_images(model, tokenizer, zip(texts), **drawing(options)), labels


def sample(checkpoint: str, options: SampleOptions) -> Path | str:
    """Write the images that `draw` returns and return the file; or return a caption."""
    if options.image is None:
        images, _ = draw(checkpoint, options)
        return imagegpt.save_samples(images, options)
    model, tokenizer = load_both(checkpoint, options)
    size = model.config.height * tokenizer.config.downsample
    image = read_image(options.image, size)
    given = [options.text] * bool(options.text) + [image]
    parts = model.complete(tokenizer, given, "text", **drawing(options))
    texts = [part.strip() for part in parts if isinstance(part, str)]
    return " ... ".join(texts) or "(no caption)"


def read_image(file: Path, size: int) -> Tensor:
    """The central square of an image file, resized: (3, size, size) in [0, 1]."""
    try:
        return to_item(read_square(file, size, file), 0, "").image
    except ValueError as error:
        raise ValueError(str(error).split(". Repair")[0]) from error
