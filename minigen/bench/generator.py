"""Quality of the images of chapter 10's generator, by steps and guidance."""

from minigen.bench import Row
from minigen.bench.decoders import DECODING, UNITS
from minigen.bench.sweep import Judge, as_rows, landscapes, named
from minigen.runs import shipped
from minigen.train.diffusion import SampleOptions, draw

SETTINGS = [*({"guidance": 2.0} | setting for setting in DECODING),
            *({"guidance": scale, "steps": 16, "method": "euler"}
              for scale in (1.0, 1.5, 3.0, 4.0))]


def rows(quick: bool) -> list[Row]:
    """Rows for each setting, then for real images."""
    count = 72 if quick else 500
    judge = Judge(landscapes("val", count if quick else 1000)[0])
    note, found = f"{count} images, extractor {judge.extractor.hash}", []
    for setting in SETTINGS[:1] if quick else SETTINGS:
        drawn = draw(shipped("diffusion", "classes"),
                     SampleOptions(count=count, seed=1, **setting))
        found += as_rows(named(setting), judge(*drawn), UNITS, note)
    return found + as_rows(
        "real images", judge(*landscapes("test", count)), UNITS, note)
