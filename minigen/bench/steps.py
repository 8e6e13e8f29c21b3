"""How many steps MaskGIT needs, how much noise, and which order: quality and seconds.

Beside it is chapter 5's model, of the same tokenizer, size and training budget."""

import torch

from minigen.bench import Row, medians
from minigen.bench.sweep import Judge, as_rows, landscapes, named
from minigen.checkpoints import load
from minigen.devices import pick_device
from minigen.runs import shipped
from minigen.sampling import Guidance
from minigen.train import imagegpt, maskgit

STEPS = (1, 2, 4, 8, 12, 16, 32, 64)
NOISES = (0.0, 1.0, 2.0, 4.5, 20.0)  # 4.5 is the default
SETTINGS = [
    *({"steps": steps} for steps in STEPS),
    *({"steps": steps, "noise": noise} for noise in NOISES if noise != 4.5
      for steps in STEPS[1:]),
    *({"steps": steps, "order": order} for order in ("halton", "random")
      for steps in STEPS[1:]),
]
UNITS = ("FD", "precision", "recall", "accuracy")


def seconds(variant: str) -> list[Row]:
    """Rows with the seconds of one guided image: MaskGIT by steps, and ImageGPT."""
    device = pick_device()
    options = {"labels": torch.zeros(1, dtype=torch.int64, device=device),
               "guidance": Guidance(2.0)}
    models = {name: load(shipped(name, variant)).to(device)
              for name in ("vq", "maskgit", "imagegpt")}
    timed = {named({"steps": steps}): lambda steps=steps: models[
        "maskgit"].generate_images(models["vq"], 1, steps=steps, **options)
             for steps in STEPS}
    timed["ImageGPT"] = lambda: models["imagegpt"].generate_images(
        models["vq"], 1, **options)
    return [Row(case, value, "s") for case, value in medians(timed, 7).items()]


def compare(variant: str, settings: list[dict], count: int, quick: bool) -> list[Row]:
    """Rows for each setting, ImageGPT and real images, with `count` images each.

    `quick` takes only the first setting.
    """
    judge = Judge(landscapes("val", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    runs = [("maskgit", setting) for setting in settings[:1 if quick else None]]
    found, scripts = [], {"maskgit": maskgit, "imagegpt": imagegpt}
    for name, setting in [*runs, ("imagegpt", {})]:
        script = scripts[name]
        drawn = script.draw(shipped(name, variant), script.SampleOptions(
            count=count, seed=1, **setting))
        found += as_rows(named(setting) or "ImageGPT", judge(*drawn), UNITS, note)
    floor = judge(*landscapes("test", count))
    return found + as_rows("real images", floor, UNITS, note)


def rows(quick: bool) -> list[Row]:
    """Rows for 64 tokens: each setting, ImageGPT, real images, and seconds."""
    variant = "tokens64"
    return compare(variant, SETTINGS, 72 if quick else 500, quick) + seconds(variant)
