"""Train the model of chapter 10, a generator or a decoder, drawing along the way."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import torch
from torch import Tensor, nn

from minigen.checkpoints import load
from minigen.codes import load_tokenizer
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.diffusion import Diffusion, ImagesAndCodes, Method, flow_loss
from minigen.pixelgpt import image_statistics
from minigen.runs import TINY, RunConfig, Task, presets, run
from minigen.runs import SampleOptions as Options
from minigen.sampling import Guidance
from minigen.show import save_grid
from minigen.train import imagegpt
from minigen.transformer import TransformerConfig


@dataclass(kw_only=True)
class Config(RunConfig, TransformerConfig):
    """A run of chapter 10. Every field is an option of the command line."""

    decoder: bool = False  # train a decoder of `tokenizer`'s tokens, not a generator
    tokenizer: str = ""  # of the decoder, as in chapter 5; empty: train one first
    codes_in: str = ""  # folder for the codes, which runs can share; empty: `out`
    ten_crop: bool = False  # not supported: training pairs whole images with codes
    network: Literal["unet", "dit"] = "unet"  # convolutions, or a transformer
    channels: int = 24  # unet: at its finest level; 2 and 4 times as many at the others
    blocks: int = 1  # unet: residual blocks on each level, on the way down and up
    patch_size: int = 2  # side of the patches that the network reads, in pixels
    positions: Literal["learned", "rowcol"] = "rowcol"  # not used: dit is "rowcol"
    labels: bool = True  # condition the generator on classes, if there are several
    class_dropout: float = 0.1  # share of labels left out in training, for guidance
    token_dropout: float = 0.1  # share of images whose tokens are left out in training
    guidance: float = 2.0  # class guidance scale at the evaluations
    sampling_steps: int = 20  # steps of Heun's method at the evaluations
    batch_size: int = 16  # images per batch, over all processes together
    weight_decay: float = 0.0  # on matrices and kernels only
    out: Path = Path("runs/diffusion")  # checkpoint, images and result.json go here

    def __post_init__(self):
        super().__post_init__()
        if self.ten_crop:
            raise ValueError("ten_crop makes codes of crops, but this script trains on "
                             "whole images and their codes: leave it out")


PRESETS = presets(
    Config,
    test=TINY | {"dim": 16, "heads": 2, "depth": 1, "channels": 4, "sampling_steps": 2},
    demo={"train_images": 1000, "dim": 64, "channels": 16, "precision": "float32"},
    # 5e14 FLOPs, and 3 MB in half precision
    cpu={"size": 64, "dim": 128, "heads": 4, "depth": 6, "train_images": 40_000,
         "val_images": 1000, "steps": 16_000, "batch_size": 32, "lr": 1e-3,
         "warmup": 200, "ema": 0.999, "save_every": 500,
         "eval_steps": (500, 2000, 8000, 16_000)},
    # about the size of smalldiffusion's models; one GPU
    full={"size": 64, "dim": 512, "heads": 8, "depth": 6, "channels": 96, "blocks": 2,
          "ema": 0.9995, "train_images": 50_000, "val_images": 1000, "steps": 50_000,
          "batch_size": 64, "lr": 5e-4, "warmup": 500, "save_every": 1000,
          "eval_steps": (500, 2000, 10_000, 25_000, 50_000)},
)


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 10 and its images, beside their codes for a decoder.

    The image file of a step shows, for a generator, one image of each class in turn,
    and for a decoder, validation images with their decoded tokens below.
    """
    data = {split: config.dataset(split) for split in ("train", "val")}
    images = torch.stack([item.image for item in data["val"]])
    columns, about, tokens = config.samples, {}, None
    classes = len(data["train"].classes) if config.labels and not config.decoder else 0
    classes = classes if classes > 1 else 0
    if config.decoder:
        name, codes = imagegpt.make_codes(config, device)
        tokenizer = load_tokenizer(name).to(device)
        data = {split: ImagesAndCodes(data[split], part)
                for split, part in zip(data, codes, strict=True)}
        about = {"codebook_size": tokenizer.codebook_size,
                 "downsample": tokenizer.config.downsample,
                 "tokenizer": config.tokenizer or "tokenizer",
                 "fingerprint": tokenizer.fingerprint()}
        tokens = tokenizer.encode(images[:columns])
    torch.manual_seed(config.seed)  # even if making the codes used random numbers
    model = Diffusion(config.select(
        get_type_hints(Diffusion.__init__)["config"], height=config.size,
        width=config.size, classes=classes, **about)).to(device)

    def draw(model: nn.Module, count: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(config.seed)
        steps = {"steps": config.sampling_steps, "generator": generator}
        if tokens is not None:
            return model.decode(tokens[:count], **steps).cpu()
        labels = torch.arange(count) % classes if classes else None
        guidance = Guidance(config.guidance) if classes else None
        return model.generate_images(count, labels, guidance=guidance, **steps).cpu()

    def evaluate(model: nn.Module, step: int) -> dict:
        drawn = draw(model, columns)
        shown = drawn if tokens is None else torch.cat([images[:columns], drawn])
        save_grid(shown, config.out / f"step-{step:05d}.png", columns=columns,
                  scale=max(1, 128 // config.size))
        return image_statistics(drawn, images)

    def summarize(model: nn.Module, last: dict) -> dict:
        start = time.perf_counter()
        draw(model, 1)
        metrics = {"seconds_per_image": time.perf_counter() - start}
        return metrics | {name: last[name] for name in image_statistics(images, images)}

    return Task(model=model, data=data["train"], val=data["val"], loss=flow_loss,
                evaluate=evaluate, summarize=summarize, parts="images")


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("diffusion", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(Options):
    """Generate images, or decode tokens, with a checkpoint of chapter 10."""

    tokenizer: str = ""  # of a decoder, as in `train`; empty: the decoder's own
    # decoder: model of chapter 5, 7 or 8 that makes the tokens; empty: those of `data`
    prior: str = ""
    label: int | None = None  # class of all images; None: each in turn
    guidance: float = 2.0  # class guidance scale: 1 is none
    steps: int = 20  # integration steps from noise to an image
    method: Method = "heun"  # two network passes per step; "euler" takes one


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in [0, 1] of the model `load(checkpoint)`; labels or None.

    A decoder gets its tokens from the model `prior`, or from validation images.
    """
    device, count = pick_device(), options.count
    model = load(checkpoint, Diffusion).to(device)
    if options.temperature != 1 and not options.prior:
        raise ValueError("--temperature is that of a --prior: diffusion has none")
    if options.label is not None and not (options.prior or model.config.classes):
        raise ValueError("this model takes no class: leave out --label")
    generator = torch.Generator(device).manual_seed(options.seed)
    guidance, labels = Guidance(options.guidance), None
    how = {"steps": options.steps, "method": options.method, "generator": generator}
    tokens = prior = None
    if model.config.codebook_size:
        tokenizer = imagegpt.tokenizer_of(checkpoint, model, options).to(device)
        if options.prior:
            prior = load(options.prior).to(device)
            imagegpt.check_tokenizer(prior, tokenizer)
            labels = torch.arange(count) % max(1, prior.config.classes)
        else:
            val = load_dataset(options.data, model.config.height, "val", count)
            chosen = [val[n % len(val)] for n in range(count)]
            labels = torch.tensor([item.label for item in chosen])
            tokens = tokenizer.encode(torch.stack([item.image for item in chosen]))
    elif model.config.classes:
        labels = torch.arange(count) % model.config.classes
    if options.label is not None and labels is not None and tokens is None:
        labels = torch.full((count,), options.label)
    images = []
    for part in torch.arange(count).split(100):
        chosen = None if labels is None else labels[part]
        if prior is not None:
            drawn = prior.generate(len(part), chosen, guidance=guidance,
                                   temperature=options.temperature,
                                   generator=generator).view(-1, *model.grid)
            images.append(model.decode(drawn, **how).cpu())
        elif tokens is not None:
            images.append(model.decode(tokens[part], **how).cpu())
        else:
            images.append(model.generate_images(
                len(part), chosen, guidance=guidance if labels is not None else None,
                **how).cpu())
    return torch.cat(images), labels


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write a grid of the images that `draw` returns; return the file."""
    images, _ = draw(checkpoint, options)
    return imagegpt.save_samples(images, options)
