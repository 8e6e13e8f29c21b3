"""Where the gain of Next Patch Prediction comes from: its patches, or its schedule?

Each run has three seeds; FD-landscape and class accuracy are of its images."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from minigen.bench import Row
from minigen.bench.sweep import Judge, as_rows, landscapes
from minigen.train import npp
from minigen.training import read_log

STEPS = 1000
# LlamaGen's rate is constant. NPP's starts anew in each stage and falls at its end.
RUNS = {
    "next token, constant rate": {"level": 1, "lr_decay": "none"},
    "next token, NPP's schedule": {"level": 2, "patches": False},
    "next token, compressed": {"level": 1, "steps": 0.6},  # about the cost of level 2
    "NPP, level 2": {"level": 2},
    "NPP, level 3": {"level": 3},
}
# A small run of a model of 64 tokens per image
SHORT = {"depth": 4, "heads": 2, "dim": 128, "batch_size": 64, "lr": 2e-3,
         "train_images": 8000, "warmup": 50, "dropout": 0.0, "ema": 0.99}
UNITS = ("bits", "FD", "accuracy", "Mtokens", "Tflop", "s")


def configuration(name: str, run: dict, seed: int, quick: bool, folder: Path,
                  ) -> npp.Config:
    """The options of a small run: 64 tokens per image, and images of its own seed."""
    preset = npp.PRESETS["test" if quick else "cpu"]
    steps = 8 if quick else STEPS
    changes = {"steps": steps} | run
    changes["steps"] = int(changes["steps"] * (steps if changes["steps"] < 1 else 1))
    if not quick:
        changes |= SHORT
    steps = changes["steps"]
    return replace(preset, size=64, tokenizer="vq-cpu-tokens64", seed=seed, **changes,
                   eval_steps=(steps // 4, steps // 2, steps), save_every=steps,
                   codes_in=str(folder / f"codes-{seed}"),
                   out=folder / f"{name}-{seed}".replace(" ", "-"))


def rows(quick: bool) -> list[Row]:
    """Rows for each run and seed, the bits also at a quarter and half of its steps."""
    count, found = 72 if quick else 500, []
    judge = Judge(landscapes("test", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if quick else 3):
            for name, run in RUNS.items():
                config = configuration(name, run, seed, quick, Path(folder))
                result, case = npp.main(config), f"{name}, seed {seed}"
                for line in result["history"][:-1]:
                    found.append(Row(f"{case}, step {line['step']}",
                                     line["val_loss"] / math.log(2), "bits"))
                images, labels = npp.draw(
                    str(config.out), npp.SampleOptions(count=count, seed=1))
                read = sum(64 / config.side(step)**2
                           for step in range(1, config.steps + 1))
                figures = judge(images, labels) | {
                    "bits": result["metrics"]["bits_per_token"],
                    "s": read_log(config.out)[-1]["seconds"],
                    "Mtokens": read * config.batch_size / 1e6,
                    "Tflop": result["cost"]["flops"] / 1e12}
                found += as_rows(case, figures, UNITS, note)
    floor = judge(*landscapes("val", count))
    return found + as_rows("real images", floor, UNITS, note)
