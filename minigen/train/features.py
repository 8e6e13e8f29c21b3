"""Train a feature network of chapter 6, which names what a landscape shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minigen.features import (
    FeatureConfig,
    FeatureNetwork,
    naming_loss,
    naming_targets,
)
from minigen.runs import TINY, RunConfig, Task, presets, run


@dataclass(kw_only=True)
class Config(RunConfig):
    """A run of chapter 6. Every field is an option of the command line."""

    body: Literal["plain", "residual"] = "residual"  # kind of each level's convolutions
    widths: tuple[int, ...] = (24, 48, 64, 96)  # channels of the levels
    dim: int = 64  # number of features of an image
    size: int = 64  # side of the square images it reads, in pixels
    weight_decay: float = 0.05  # on matrices and kernels only
    batch_size: int = 64  # images per batch, over all processes together
    out: Path = Path("runs/features")  # checkpoint and result.json go here


PRESETS = presets(
    Config,
    test=TINY | {"widths": (8, 8), "dim": 8, "batch_size": 4},
    # two CPU cores, half a minute
    demo={"size": 32, "train_images": 4000, "val_images": 256, "steps": 250,
          "eval_steps": (50, 100, 250), "ema": 0.97, "precision": "float32",
          "lr": 3e-3},
    # one CPU core, five minutes
    cpu={"train_images": 0, "val_images": 1000, "steps": 3000, "lr": 3e-3, "ema": 0.99,
         "warmup": 100, "eval_steps": (100, 200, 400, 800, 1600, 3000),
         "save_every": 500},
    full={"train_images": 0, "val_images": 2000, "steps": 20_000, "batch_size": 256,
          "lr": 3e-3, "ema": 0.999, "warmup": 500, "save_every": 1000, "workers": 8,
          "eval_steps": (200, 1000, 5000, 20_000)},
)


def build(config: Config, device: torch.device) -> Task:
    """The network of chapter 6, and the landscapes with their captions."""
    data, val = config.dataset("train"), config.dataset("val")
    model = FeatureNetwork(config.select(FeatureConfig, classes=data.classes))
    images = torch.stack([item.image for item in val])
    labels = torch.tensor([item.label for item in val])
    moods, words = naming_targets(model.config, [item.caption for item in val])

    @torch.inference_mode()
    def evaluate(model: FeatureNetwork, step: int) -> dict:
        model.eval()
        features = torch.cat([model(part.to(device)) for part in images.split(64)])
        logits = [value.cpu() for value in model.predict(features)]
        right = (logits[0].argmax(1) == labels, logits[1].argmax(1) == moods,
                 (logits[2] > 0) == words.bool())
        names = ("class_accuracy", "mood_accuracy", "word_accuracy")
        return {name: found.float().mean().item()
                for name, found in zip(names, right, strict=True)}

    def summarize(model: FeatureNetwork, last: dict) -> dict:
        names = ("class_accuracy", "mood_accuracy", "word_accuracy")
        return {name: last[name] for name in names}

    return Task(model=model.to(device), data=data, val=val, loss=naming_loss,
                evaluate=evaluate, summarize=summarize, parts="images")


def main(config: Config) -> dict:
    """Train and return the result; see `minigen.runs.run`."""
    return run("features", config, PRESETS, build)
