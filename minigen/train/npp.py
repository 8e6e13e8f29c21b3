"""Train the model of chapter 8 from coarse to fine, generating images along the way."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from minigen.archive import write_archive
from minigen.checkpoints import load
from minigen.codes import CodeItem
from minigen.devices import pick_device
from minigen.npp import NPP, SIZES, patch_token_loss, stage_ends, stage_sides
from minigen.runs import Task, run
from minigen.sampling import Guidance
from minigen.train import imagegpt


@dataclass(kw_only=True)
class Config(imagegpt.Config):
    """A run of chapter 8. Every field is an option of the command line."""

    level: int = 2  # number of stages; patches start at 2^(level - 1) tokens a side
    epoch_rate: float = 0.5  # the stage of side 2^n ends at step steps * epoch_rate^n
    patches: bool = True  # False: single tokens throughout, but the stages' schedule
    # sets depth, heads and dim: LlamaGen's sizes, or our cpu and gpu; empty: no change
    shape: Literal["", "cpu", "gpu", "B", "L", "XL", "XXL", "3B"] = ""
    norm: Literal["layer", "rms"] = "rms"  # LayerNorm (GPT-2) or RMSNorm (Llama)
    mlp: Literal["gelu", "swiglu"] = "swiglu"  # GELU (GPT-2) or SwiGLU (Llama)
    # position encoding, as in chapter 5; patches need rope2d
    positions: Literal["learned", "rowcol", "rope2d", "none"] = "rope2d"
    attention_dropout: float | None = 0.0  # of attention weights; None means `dropout`
    # how the rate falls: half a cosine, a line over the last fifth, or not at all
    lr_decay: Literal["cosine", "linear", "none"] = "linear"
    out: Path = Path("runs/npp")  # checkpoint, images and result.json go here

    def __post_init__(self):
        for name, value in SIZES.get(self.shape, {}).items():
            setattr(self, name, value)
        super().__post_init__()
        stage_ends(self.steps, self.level, self.epoch_rate)  # or a ValueError now

    def stage(self, step: int) -> tuple[int, int]:
        """The last step before the stage of a step, and the last step in it."""
        ends = stage_ends(self.steps, self.level, self.epoch_rate)
        begins = [0, *ends]
        n = sum(end < step for end in ends)
        return begins[n], ends[n]

    def side(self, step: int) -> int:
        """The side of the patches at a step, in tokens."""
        if not self.patches:
            return 1
        _, end = self.stage(step)
        ends = stage_ends(self.steps, self.level, self.epoch_rate)
        return stage_sides(self.level)[ends.index(end)]


def preset(name: str, **changes) -> Config:
    """A preset of chapter 5 with this chapter's block and schedule, and `changes`."""
    kept = ("out", "norm", "mlp", "positions", "attention_dropout", "lr_decay")
    same = {f.name: getattr(imagegpt.PRESETS[name], f.name)
            for f in fields(imagegpt.Config) if f.name not in kept}
    return Config(**same | changes)


PRESETS = {
    "test": preset("test", steps=4, eval_steps=(1, 4), mlp_multiple=8),
    "demo": preset("demo", mlp_multiple=8),
    # 5e14 FLOPs as in chapter 5, which allow more steps at level 2
    "cpu": preset("cpu", mlp_multiple=8, steps=6250,
                  eval_steps=(100, 400, 1000, 3125, 6250)),
    "full": preset("full"),
    # NPP's train_c2i.sh: 300 epochs in batches of 256, the first for warm-up, dropout
    # of 0.1 except in attention. Not as published: a resumed run keeps its schedule
    "paper": preset("paper", warmup=5005),
}


class StagedLoss:
    """`patch_token_loss` at the side of the current stage, and at 1 in eval mode."""

    side = 1

    def __call__(self, model: nn.Module, batch: CodeItem) -> Tensor:
        return patch_token_loss(model, batch, self.side if model.training else 1)


def build(config: Config, device: torch.device) -> Task:
    """The model of chapter 8 and its codes; its images are those of chapter 5."""
    loss = StagedLoss()
    task = imagegpt.build(config, device, NPP, loss)

    def before_step(step: int) -> None:
        loss.side = config.side(step)

    stages = {name: getattr(config, name)
              for name in ("level", "epoch_rate", "patches")}
    return replace(task, before_step=before_step, settings=task.settings | stages)


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("npp", config, PRESETS, build)


@dataclass(kw_only=True)
class SampleOptions(imagegpt.SampleOptions):
    """Generate images with a model of chapter 8: a grid, or many in an .npz file."""


def draw(checkpoint: str, options: SampleOptions) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in [0, 1] of the model `load(checkpoint)`; labels or None."""
    return imagegpt.draw(checkpoint, options, NPP)


def sample(checkpoint: str, options: SampleOptions) -> Path:
    """Write `options.count` images: a grid, or an .npz file for ADM's evaluator.

    In an .npz file, classes take turns, so their counts differ by at most one; see
    `write_archive`. Returns the file.
    """
    if options.out.suffix != ".npz":
        images, _ = draw(checkpoint, options)
        return imagegpt.save_samples(images, options)
    if options.start != "nothing":
        raise ValueError("images in an .npz file are drawn from nothing: leave out "
                         f"--start {options.start}, or write a picture file")
    device = pick_device()
    model = load(checkpoint, NPP).to(device)
    tokenizer = imagegpt.tokenizer_of(checkpoint, model, options).to(device)
    classes = model.config.classes

    def draw_batch(numbers: Tensor, generator: torch.Generator) -> Tensor:
        labels = guidance = None
        if classes:
            labels = numbers % classes
            if options.label is not None:
                labels = torch.full_like(numbers, options.label)
            guidance = Guidance(options.guidance, options.schedule)
        return model.generate_images(
            tokenizer, len(numbers), labels, guidance=guidance, generator=generator,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)

    same = {name: getattr(options, name) for name in (
        "label", "guidance", "schedule", "temperature", "top_k", "top_p")}
    size = model.config.height * tokenizer.config.downsample
    same |= {"checkpoint": str(checkpoint), "tokenizer": tokenizer.fingerprint()}
    return write_archive(
        options.out, options.count, size, options.seed, same, draw_batch)
