"""Which network of chapter 10 draws best for the same training cost: a small trial."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from minigen.bench import Row
from minigen.bench.sweep import Judge, as_rows, landscapes
from minigen.data import load_dataset
from minigen.diffusion import Diffusion, DiffusionConfig, flow_loss
from minigen.metrics import count_flops
from minigen.train import diffusion

OPERATIONS = 2e13  # of a run's training: 4 % of the common budget
NETWORKS = {"U-Net of pixels": {"network": "unet", "patch_size": 1},
            "U-Net of patches of 2 x 2": {"network": "unet", "patch_size": 2},
            "DiT of patches of 4 x 4": {"network": "dit", "patch_size": 4}}
UNITS = ("parameters", "images", "s", "loss", "FD", "accuracy")


def operations(config: diffusion.Config) -> float:
    """Floating-point operations of a training step."""
    items = load_dataset("landscapes", config.size, "train", 1)
    shape = {name: getattr(config, name) for name in (
        "network", "patch_size", "channels", "blocks", "dim", "depth", "heads")}
    model = Diffusion(DiffusionConfig(height=config.size, width=config.size, **shape))
    batch = torch.utils.data.default_collate([items[0]])
    return count_flops(model, flow_loss, batch) * config.batch_size


def configuration(name: str, seed: int, quick: bool, folder: Path) -> diffusion.Config:
    """The options of a run, with as many steps as `OPERATIONS` allow."""
    sizes = {"steps": 2} if quick else {"warmup": 50, "ema": 0.99,
                                        "train_images": 20_000}
    config = replace(
        diffusion.PRESETS["test" if quick else "cpu"], size=64, seed=seed, save_every=0,
        eval_steps=(), out=folder / f"{name}-{seed}".replace(" ", "-"), **sizes,
        **NETWORKS[name])
    if quick:
        return config
    return replace(config, steps=round(OPERATIONS / operations(config)))


def rows(quick: bool) -> list[Row]:
    """Rows for each network and seed, then for real images; no guidance is used."""
    count, found = 72 if quick else 500, []
    judge = Judge(landscapes("val", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if quick else 2):
            for name in NETWORKS:
                config = configuration(name, seed, quick, Path(folder))
                result = diffusion.main(config)
                drawn = diffusion.draw(str(config.out), diffusion.SampleOptions(
                    count=count, seed=1, guidance=1.0, method="euler",
                    steps=2 if quick else 20))
                figures = judge(*drawn) | {
                    "parameters": result["metrics"]["parameters"],
                    "images": result["cost"]["images_seen"],
                    "s": result["minutes"] * 60, "loss": result["metrics"]["val_loss"]}
                found += as_rows(f"{name}, seed {seed}", figures, UNITS, note)
    return found + as_rows(
        "real images", judge(*landscapes("test", count)), UNITS, note)
