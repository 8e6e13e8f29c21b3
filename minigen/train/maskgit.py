"""Train MaskGIT, the model of chapter 7, generating images along the way."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from minigen.checkpoints import load
from minigen.checks import check_numbers
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.maskgit import MaskGIT, Masking, Order, masked_token_loss
from minigen.runs import Task, run
from minigen.sampling import Guidance
from minigen.train import imagegpt


@dataclass(kw_only=True)
class Config(imagegpt.Config):
    """A run of chapter 7. Every field is an option of the command line."""

    masking: Masking = "cosine"  # schedule of hidden tokens, in training and sampling
    label_smoothing: float = 0.1  # share of probability spread evenly over all codes
    out: Path = Path("runs/maskgit")  # checkpoint, images and result.json go here

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, label_smoothing=(0, 0.999))


def preset(name: str, **changes) -> Config:
    """A preset of chapter 5 for chapter 7's model, with `changes`."""
    same = {f.name: getattr(imagegpt.PRESETS[name], f.name)
            for f in fields(imagegpt.Config) if f.name != "out"}
    return Config(**same | changes)


PRESETS = {
    "test": preset("test"),
    "demo": preset("demo"),
    "cpu": preset("cpu"),
    "full": preset("full"),
    # the paper's model for ImageNet 256 (arXiv 2202.04200, section 4.1, its released
    # configuration): 24 layers of 768, 300 epochs in batches of 256. Not as published:
    # LlamaGen's tokenizer, pre-norm blocks, an untied output layer, a falling rate
    "paper": preset("paper", dim=768, heads=8, depth=24, attention_dropout=None,
                    ten_crop=False, warmup=5000, weight_decay=0.045),
}


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 7 and its codes; its images are those of chapter 5."""
    return imagegpt.build(config, device, MaskGIT, masked_token_loss, "masked_token")


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("maskgit", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(imagegpt.SampleOptions):
    """Generate or repaint images with a checkpoint of chapter 7."""

    steps: int = 8  # network passes, each of which fills in some of the tokens
    noise: float = 4.5  # scale of the noise on confidences, which fades over the steps
    order: Order = "confidence"  # which tokens are filled in first
    masking: Masking | None = None  # schedule of the masked share; None: as trained
    # repaint part of validation images of `data`: a mask file, white where to repaint,
    # or a box "top,left,bottom,right" in pixels; empty: generate whole images
    mask: str = ""


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in [0, 1] of the model `load(checkpoint)`; labels or None."""
    more = {name: getattr(options, name)
            for name in ("steps", "noise", "order", "masking")}
    if not options.mask:
        return imagegpt.draw(checkpoint, options, MaskGIT, **more)
    device = pick_device()
    model = load(checkpoint, MaskGIT).to(device)
    tokenizer = imagegpt.tokenizer_of(checkpoint, model, options).to(device)
    side = tokenizer.config.downsample
    size = model.config.height * side, model.config.width * side
    val = load_dataset(options.data, size[0], "val", options.count)
    chosen = [val[n % len(val)] for n in range(options.count)]
    images = torch.stack([item.image for item in chosen])
    labels = guidance = None
    if model.config.classes:
        guidance = Guidance(options.guidance, options.schedule)
        labels = torch.tensor([item.label if options.label is None else options.label
                               for item in chosen])
    images = model.edit_images(
        tokenizer, images, read_mask(options.mask, *size), labels, guidance=guidance,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        generator=torch.Generator(device).manual_seed(options.seed), **more)
    return images.cpu(), labels


def read_mask(source: str, height: int, width: int) -> Tensor:
    """A mask (H, W) of bools: from an image file, True where it is light, or a box."""
    if Path(source).suffix:
        gray = pil_to_tensor(Image.open(source).convert("L"))[0]
        return gray > 127
    try:
        top, left, bottom, right = map(int, source.split(","))
    except ValueError:
        raise ValueError("expected a mask as an image file or as a box "
                         f"top,left,bottom,right in pixels, found {source!r}") from None
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"expected a box within {height} x {width} pixels as "
                         f"top,left,bottom,right, found {source}")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write a grid of the images that `draw` returns; return the file."""
    images, _ = draw(checkpoint, options)
    return imagegpt.save_samples(images, options)
