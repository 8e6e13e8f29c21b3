"""Train the tokenizer of chapter 4, reconstructing images along the way."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigen.checkpoints import differences
from minigen.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from minigen.codes import load_tokenizer
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.runs import TINY, RunConfig, Task, presets, run
from minigen.show import save_grid
from minigen.vq import LLAMAGEN, VQConfig, VQModel, reconstruction_quality
from minigen.vqgan import VQGAN, tokenizer_loss


@dataclass(kw_only=True)
class Config(RunConfig, VQConfig):
    """A run of chapter 4. Every field is an option of the command line."""

    init: str = ""  # tokenizer of the same shape to start from; empty: none
    decoder_only: bool = False  # freeze encoder and codebook: tokens keep their meaning
    pixels: Literal["l1", "l2"] = "l1"  # absolute or squared error of the pixels
    features: float = 0.1  # weight of distances in a small network's features; 0: none
    perceptual: float = 0.0  # weight of LPIPS, which downloads VGG's weights; 0: none
    adversarial: float = 0.0  # weight of the adversarial loss; 0: no discriminator
    adversarial_start: int = 0  # steps before the adversarial training starts
    adversarial_channels: int = 32  # width of the discriminator's first layer
    # halvings in the discriminator, 1 to 3: a logit sees 16, 34 or 70 pixels a side
    adversarial_layers: int = 2
    weight_decay: float = 0.05  # on matrices and kernels only; LlamaGen's
    batch_size: int = 16  # images per batch, over all processes together
    out: Path = Path("runs/vq")  # checkpoint, images and result.json go here

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, features=NOT_NEGATIVE, perceptual=NOT_NEGATIVE,
                      adversarial=NOT_NEGATIVE, adversarial_start=NOT_NEGATIVE,
                      adversarial_channels=POSITIVE)


PRESETS = presets(
    Config,
    test=TINY | {"downsample": 4, "channels": 8, "z_channels": 8, "codebook_size": 32,
                 "codebook_dim": 4},
    # two CPU cores, half a minute
    demo={"downsample": 4, "channels": 16, "codebook_size": 512, "decay": 0.9,
          "steps": 120, "warmup": 20, "precision": "float32", "eval_steps": (30, 120),
          "save_every": 60},
    # 5e14 FLOPs: an hour on one core with bfloat16; 5 MB in float16 set the width
    cpu={"size": 64, "downsample": 4, "channels": 24, "decay": 0.98, "train_images": 0,
         "val_images": 1000, "steps": 5550, "lr": 1e-3, "warmup": 100, "ema": 0.998,
         "save_every": 200, "eval_steps": (100, 400, 1000, 2000, 5550)},
    # one GPU
    full={"size": 64, "channels": 64, "blocks": 2, "codebook_size": 4096,
          "train_images": 50_000, "val_images": 1000, "steps": 20_000, "warmup": 500,
          "batch_size": 64, "lr": 1e-3, "ema": 0.999, "save_every": 1000,
          "eval_steps": (200, 400, 800, 1600, 3000, 6000, 10_000, 20_000)},
    # LlamaGen's on ImageNet (arXiv 2406.06525, section 3.1): 40 epochs, batches of 128
    paper=LLAMAGEN | {
        "size": 256, "downsample": 16, "data": "imagenet", "train_images": 1_281_167,
        "val_images": 5000, "steps": 400_000, "batch_size": 128, "lr": 1e-4,
        "warmup": 1, "pixels": "l2", "features": 0.0, "perceptual": 1.0,
        "adversarial": 0.5, "adversarial_channels": 64, "adversarial_layers": 3,
        "adversarial_start": 20_000, "save_every": 5000,
        "eval_steps": (1000, 5000, 20_000, 50_000, 100_000, 200_000, 400_000)},
)


def build(config: Config, device: torch.device) -> Task:
    """The tokenizer of chapter 4 with its losses, and its data."""
    model = VQModel(config.select(VQConfig))
    if config.init:
        start = load_tokenizer(config.init)
        if found := differences(asdict(start.config), asdict(model.config)):
            raise ValueError(f"{config.init} has another shape than this run: "
                             f"{'; '.join(found)}. Use the options it was trained with")
        model.load_state_dict(start.state_dict())
    gan = VQGAN(model, config.pixels, config.features, config.perceptual,
                config.adversarial, config.adversarial_start * config.accumulate,
                config.adversarial_channels, config.adversarial_layers,
                config.decoder_only)
    val, tokens = config.dataset("val"), math.prod(model.grid(config.size, config.size))
    images = torch.stack([item.image for item in val])
    shown = images[: config.samples]

    def evaluate(gan: VQGAN, step: int) -> dict:
        save_pairs(gan.model, shown, config.out / f"step-{step:05d}.png",
                   columns=len(shown), scale=max(1, 128 // config.size))
        return reconstruction_quality(gan.model, images, config.batch_size)

    def summarize(gan: VQGAN, last: dict) -> dict:
        bits = tokens * math.log2(model.codebook_size)
        quality = {k: last[k] for k in ("psnr", "ssim", "usage", "perplexity")}
        return quality | {"tokens_per_image": tokens,
                          "bits_per_pixel": bits / config.size**2}

    settings = ("decoder_only", "pixels", "features", "perceptual", "adversarial",
                "adversarial_start", "adversarial_channels", "adversarial_layers")
    return Task(model=gan.to(device), data=config.dataset("train"), val=val,
                loss=tokenizer_loss, evaluate=evaluate, summarize=summarize,
                keep=lambda gan: gan.model, parts="images",
                settings={name: getattr(config, name) for name in settings})


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("vq", config, PRESETS, build)


def save_pairs(model: VQModel, images: Tensor, path: Path, columns: int, scale: int):
    """Write a grid of images with their reconstructions below each row."""
    again = model.decode(model.encode(images)).cpu()
    blank = images.new_ones(-len(images) % columns, *images.shape[1:])
    rows = [torch.cat([part, blank]).unflatten(0, (-1, columns))
            for part in (images, again)]
    grid = torch.stack(rows, dim=1).flatten(0, 2)
    save_grid(grid, path, columns=columns, scale=scale)


@dataclass(kw_only=True)
class SampleOptions:
    """Reconstruct validation images with a tokenizer of chapter 4."""

    data: str = "landscapes"  # a data set's name, or a folder of images
    size: int = 64  # side of the square images, in pixels
    count: int = 8  # images to reconstruct
    columns: int = 8  # images per row
    scale: int = 2  # factor by which the file enlarges the images
    out: Path = Path("samples.png")  # file to write

    def __post_init__(self):
        check_numbers(self, size=POSITIVE, count=POSITIVE, columns=POSITIVE,
                      scale=POSITIVE)


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, Tensor]:
    """Reconstructions (B, 3, H, W) in [0, 1] of validation images, and their labels."""
    model = load_tokenizer(checkpoint).to(pick_device())
    val = load_dataset(options.data, options.size, "val", options.count)
    images = torch.stack([item.image for item in val])
    again = [model.decode(model.encode(part)).cpu() for part in images.split(100)]
    return torch.cat(again), torch.tensor([item.label for item in val])


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write validation images and their reconstructions; return the file."""
    model = load_tokenizer(checkpoint).to(pick_device())
    val = load_dataset(options.data, options.size, "val", options.count)
    images = torch.stack([item.image for item in val])
    columns = min(options.columns, len(images))
    save_pairs(model, images, options.out, columns, options.scale)
    return options.out
