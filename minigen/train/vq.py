"""Train the tokenizer of chapter 4, giving pictures back along the way."""

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from minigen.data import load_dataset
from minigen.show import save_grid
from minigen.training import (
    RunConfig,
    differences,
    evaluate,
    finish_run,
    fit,
    is_main_process,
    pick_device,
    progress,
    read_log,
    save_checkpoint,
)
from minigen.vq import LLAMAGEN, VQConfig, VQModel, load_tokenizer, reconstruction_quality
from minigen.vqgan import VQGAN, tokenizer_loss


@dataclass
class Config(VQConfig, RunConfig):
    """A run of chapter 4. Every field can be set on the command line; the rest is the preset's."""

    init: str = ""  # a tokenizer of the same shape to begin with, as `load_tokenizer` takes it; empty: begin with nothing
    size: int = 32  # side of the square pictures, in pixels
    downsample: int = 4  # pixels of the picture's side for one token: 4, 8 or 16
    channels: int = 16  # width of the convolutions at the picture's own size
    codes: int = 512  # K: size of the codebook; for fsq the product of `levels`
    perceptual: float = 0.0  # weight of LPIPS, which downloads VGG's weights; 0 leaves it out
    adversarial: float = 0.0  # weight of the discriminator; 0 leaves it out
    adversarial_start: int = 0  # steps before the discriminator begins
    adversarial_channels: int = 64  # width of the discriminator's first layer
    weight_decay: float = 0.05  # on matrices only; LlamaGen's
    batch_size: int = 16  # pictures a batch, over all processes together
    train_images: int = 1600  # how many pictures to draw or read for training
    steps: int = 120  # optimizer steps
    warmup: int = 20  # steps until the rate is reached
    sample_at: tuple[int, ...] = (30, 120)  # steps after which to evaluate and give pictures back
    save_every: int = 60  # steps between the states from which a run that was stopped can go on
    out: Path = Path("runs/vq")  # checkpoint, pictures and result.json go here


LARGE = dict(blocks=2, train_images=50_000, val_images=1000, warmup=500, batch_size=64, lr=1e-3, ema=0.999, save_every=1000)

PRESETS = {
    "test": Config("test", size=16, channels=8, hidden=8, codes=32, dim=4, train_images=16, val_images=8, steps=3, batch_size=4, warmup=1,
                   sample_at=(1, 3), samples=4, save_every=1),
    "demo": Config("demo", decay=0.9, precision="float32"),  # two CPU cores, half a minute
    "cpu": Config("cpu", size=64, downsample=8, channels=32, codes=1024, decay=0.95, train_images=12_000, val_images=256, steps=1500, warmup=100, lr=2e-3,
                  sample_at=(50, 100, 200, 400, 800, 1500), save_every=250),  # one CPU core, twenty minutes
    "full": Config("full", size=64, downsample=8, channels=64, codes=4096, **LARGE, steps=20_000,
                   sample_at=(200, 400, 800, 1600, 3000, 6000, 10_000, 20_000)),  # one GPU
    # LlamaGen's tokenizer on ImageNet (arXiv 2406.06525, section 3.1): 40 epochs of 1.28 million pictures, batches of 128
    "paper": Config("paper", size=256, downsample=16, **LLAMAGEN, data="imagenet", train_images=1_281_167, val_images=5000,
                    steps=400_000, batch_size=128, lr=1e-4, warmup=1, ema=0.0, perceptual=1.0, adversarial=0.5, adversarial_start=20_000,
                    sample_at=(1000, 5000, 20_000, 50_000, 100_000, 200_000, 400_000), save_every=5000),
}


def main(config: Config) -> dict:
    """Train, write the checkpoint, the pictures and `result.json` to `config.out`, and return the result.

    Of several processes the first one evaluates and writes; the others return an empty result. A picture file holds pictures of
    the validation set, above, and what the tokenizer makes of them, below.
    """
    torch.manual_seed(config.seed)
    device = pick_device()
    model = VQModel(VQConfig(**{field.name: getattr(config, field.name) for field in fields(VQConfig)}))
    if config.init:
        beginning = load_tokenizer(config.init)
        if found := differences(asdict(beginning.config), asdict(model.config)):
            raise ValueError(f"{config.init} has another shape than this run: {'; '.join(found)}. Give the options that it was trained with")
        model.load_state_dict(beginning.state_dict())
    tokens_per_image = math.prod(model.grid(config.size, config.size))
    gan = VQGAN(model, config.adversarial, config.perceptual, config.adversarial_start * config.accumulate, config.adversarial_channels,
                layers=min(3, config.size.bit_length() - 3)).to(device)
    average = deepcopy(gan) if config.ema else None
    kept = gan if average is None else average  # the one to evaluate and to keep
    val = config.dataset("val", config.size)
    val_images = torch.stack([item.image for item in val])
    shown = val_images[: config.samples]

    records = fit(gan, config.dataset("train", config.size), tokenizer_loss, config.recipe(), average=average, folder=config.out,
                  resume=config.resume, settings={name: getattr(config, name) for name in ("data", "perceptual", "adversarial", "adversarial_start")})
    images_per_step = config.batch_size * config.accumulate
    for record in progress(records, config.steps, images_per_step * tokens_per_image, f"vq {config.preset} {config.quantizer}"):
        if record.look and is_main_process():
            again = kept.model.decode(kept.model.encode(shown)).cpu()
            save_grid(torch.cat([shown, again]), config.out / f"step-{record.step:05d}.png", columns=len(shown),
                      scale=max(1, 128 // config.size))
            save_checkpoint(kept.model, config.out)
            record.metrics.update(val_loss=evaluate(kept, val, tokenizer_loss, config.batch_size),
                                  **reconstruction_quality(kept.model, val_images, config.batch_size))
    if not is_main_process():
        return {}

    last = read_log(config.out)[-1]
    return finish_run("vq", config, PRESETS, {
        "val_loss": last["val_loss"], "psnr": last["psnr"], "ssim": last["ssim"], "usage": last["usage"], "perplexity": last["perplexity"],
        "tokens_per_image": tokens_per_image,
        "bits_per_pixel": tokens_per_image * math.log2(model.codes) / config.size**2,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": config.steps * images_per_step / last["seconds"],
    })


@dataclass
class SampleOptions:
    """Pictures given back by a checkpoint of chapter 4."""

    data: str = "landscapes"  # a data set's name, or a folder of pictures
    size: int = 64  # side of the square pictures, in pixels
    count: int = 8  # how many pictures
    columns: int = 8  # pictures beside each other: a row of pictures, below it what was made of them
    scale: int = 2  # pixels on the file for each pixel of a picture
    out: Path = Path("samples.png")


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Draw pictures and what the tokenizer in `checkpoint` (a folder, or a name on the Hugging Face hub) makes of them."""
    model = load_tokenizer(checkpoint).to(pick_device())
    val = load_dataset(options.data, options.size, "val", options.count)
    images = torch.stack([item.image for item in val])
    again = model.decode(model.encode(images)).cpu()
    columns = min(options.columns, len(images))
    missing = images.new_ones(-len(images) % columns, *images.shape[1:])  # white, where the last row is not full
    rows = (torch.cat([pictures, missing]).unflatten(0, (-1, columns)) for pictures in (images, again))
    save_grid(torch.stack(tuple(rows), dim=1).flatten(0, 2), options.out, columns=columns, scale=options.scale)
    return options.out
