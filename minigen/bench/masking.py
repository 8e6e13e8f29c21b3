"""How well MaskGIT draws after a short training, as short as those of `schedules`.

Beside the same model after its long run; both draw 500 images in eight steps."""

import tempfile
from dataclasses import replace
from pathlib import Path

from minigen.bench import Row
from minigen.bench.schedules import SHORT, STEPS
from minigen.bench.sweep import Judge, as_rows, landscapes
from minigen.runs import shipped
from minigen.train import maskgit

UNITS = ("bits", "FD", "accuracy", "Tflop")


def configuration(seed: int, quick: bool, folder: Path) -> maskgit.Config:
    """The options of a short run, at the constant rate that ImageGPT has there."""
    preset = maskgit.PRESETS["test" if quick else "cpu"]
    sizes = {"steps": 8} if quick else SHORT | {"steps": STEPS}
    return replace(preset, size=64, tokenizer="vq-cpu-tokens64", seed=seed,
                   lr_decay="none", eval_steps=(), save_every=0,
                   codes_in=str(folder / f"codes-{seed}"), out=folder / str(seed),
                   **sizes)


def rows(quick: bool) -> list[Row]:
    """Rows for each short run, the model that ships, and real images."""
    count, found = 72 if quick else 500, []
    judge = Judge(landscapes("test", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    options = maskgit.SampleOptions(count=count, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if quick else 3):
            config = configuration(seed, quick, Path(folder))
            result = maskgit.main(config)
            figures = judge(*maskgit.draw(str(config.out), options)) | {
                "bits": result["metrics"]["bits_per_masked_token"],
                "Tflop": result["cost"]["flops"] / 1e12}
            found += as_rows(f"MaskGIT, seed {seed}", figures, UNITS, note)
    long = judge(*maskgit.draw(shipped("maskgit", "tokens64"), options))
    found += as_rows("MaskGIT, long run", long, ("FD", "accuracy"), note)
    return found + as_rows(
        "real images", judge(*landscapes("val", count)), ("FD", "accuracy"), note)
