"""How many steps MaskGIT needs, how much noise, and which order: quality and seconds.

Beside it is chapter 5's model, of the same tokenizer, size and training budget."""

import time

from minigen.bench import Row
from minigen.bench.sweep import Judge, as_rows, landscapes, named
from minigen.train import imagegpt, maskgit

STEPS = (1, 2, 4, 8, 12, 16, 32, 64)
SETTINGS = [
    *({"steps": steps} for steps in (*STEPS, 256)),
    *({"steps": steps, "noise": noise} for noise in (0.0, 1.0, 20.0)
      for steps in STEPS[1:] if steps != 12),
    *({"steps": steps, "order": order} for order in ("halton", "random")
      for steps in STEPS[1:] if steps != 12),
]


def rows(quick: bool) -> list[Row]:
    """Rows for each setting, and for ImageGPT; seconds are for one image by itself."""
    count = 72 if quick else 256
    judge = Judge(landscapes("val", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    runs = [(maskgit, "maskgit", setting) for setting in SETTINGS]
    runs.append((imagegpt, "imagegpt", {}))
    found = []
    for script, name, setting in runs[:1] + runs[-1:] if quick else runs:
        options = script.SampleOptions(count=count, seed=1, **setting)
        figures = judge(*script.draw(name, options))
        options.count = 1
        start = time.perf_counter()
        script.draw(name, options)
        figures["s"] = time.perf_counter() - start
        found += as_rows(named(setting) or "ImageGPT", figures,
                         ("FD", "precision", "recall", "accuracy", "s"), note)
    floor = judge(*landscapes("test", count))
    return found + as_rows("real images", floor, ("FD", "precision", "recall"), note)
