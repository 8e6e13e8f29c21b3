"""How well MaskGIT draws after a short training, as short as those of `schedules`.

Beside the models of the long runs, MaskGIT's and ImageGPT's; each draws 500 images."""

import tempfile
from dataclasses import replace
from pathlib import Path

from minigen.bench import Row
from minigen.bench.schedules import SHORT, STEPS
from minigen.bench.sweep import Judge, as_rows, landscapes
from minigen.runs import shipped
from minigen.train import imagegpt, maskgit

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
    """Rows for each short run, the models that ship, and real images."""
    count, found = 72 if quick else 500, []
    judge = Judge(landscapes("test", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"

    def quality(script, checkpoint: str) -> dict[str, float]:
        return judge(*script.draw(
            checkpoint, script.SampleOptions(count=count, seed=1)))

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if quick else 3):
            config = configuration(seed, quick, Path(folder))
            result = maskgit.main(config)
            figures = quality(maskgit, str(config.out)) | {
                "bits": result["metrics"]["bits_per_masked_token"],
                "Tflop": result["cost"]["flops"] / 1e12}
            found += as_rows(f"MaskGIT, seed {seed}", figures, UNITS, note)
    long = {"MaskGIT, long run": quality(maskgit, shipped("maskgit", "tokens64")),
            "ImageGPT, long run": quality(imagegpt, shipped("imagegpt", "tokens64")),
            "real images": judge(*landscapes("val", count))}
    return found + [row for case, figures in long.items()
                    for row in as_rows(case, figures, UNITS, note)]
