"""With which sampling settings chapter 5's model draws best: quality, not speed.

Each draws the same classes; FD-landscape is lower for better images."""

import torch
from torch import Tensor

from minigen.bench import Row
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.metrics import (
    class_accuracy,
    frechet_distance,
    horizontal_bias,
    in_batches,
    load_extractor,
    precision_recall,
)
from minigen.train.imagegpt import SampleOptions, draw

SETTINGS = [
    *({"guidance": scale} for scale in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)),
    *({"guidance": scale, "schedule": "linear"} for scale in (2.0, 3.0)),
    *({"guidance": 1.5, "temperature": value} for value in (0.9, 0.95, 1.05)),
    *({"guidance": 1.5, "top_p": value} for value in (0.95, 0.98)),
    {"guidance": 1.5, "top_k": 200},
]


class Judge:
    """Measures images against `real` ones (M, 3, H, W) by the network of chapter 6."""

    def __init__(self, real: Tensor):
        self.extractor = load_extractor().to(pick_device())
        self.real, self.real_features = real, self.features(real)

    def features(self, images: Tensor) -> Tensor:
        """The features (N, d) of images."""
        return torch.cat([self.extractor(batch) for batch in in_batches(images)])

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> dict:
        """Figures, by unit, of images (N, 3, H, W) of the classes `labels` (N,)."""
        features = self.features(images)
        precision, recall = precision_recall(features, self.real_features)
        found = {"FD": frechet_distance(features, self.real_features),
                 "bias": horizontal_bias(images, self.real),
                 "precision": precision, "recall": recall}
        if labels is not None:
            found["accuracy"] = class_accuracy(self.extractor.network, features, labels)
        return found


def landscapes(split: str, count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Real images (N, 3, size, size) in [0, 1], and their labels (N,)."""
    items = list(load_dataset("landscapes", size, split, count))
    return (torch.stack([item.image for item in items]),
            torch.tensor([item.label for item in items]))


def as_rows(case: str, figures: dict[str, float], units: tuple[str, ...],
            note: str) -> list[Row]:
    """A row for each of the units that are among the figures."""
    return [Row(case, figures[unit], unit, note=note) for unit in units
            if unit in figures]


def named(setting: dict) -> str:
    """A setting as text, such as "guidance 2.0, top_k 200"."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def rows(quick: bool) -> list[Row]:
    """Two rows for each setting: the distance, and the class accuracy."""
    count, units = 72 if quick else 500, ("FD", "accuracy")
    judge = Judge(landscapes("val", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    found = []
    for setting in SETTINGS[:1] if quick else SETTINGS:
        drawn = draw("imagegpt", SampleOptions(count=count, seed=1, **setting))
        found += as_rows(named(setting), judge(*drawn), units, note)
    floor = judge(*landscapes("test", count))
    return found + as_rows("real images", floor, units, note)
