"""Which sampling settings draw the best images of chapter 5: quality, not speed.

Each draws the same classes; FD-landscape is lower for better images."""

from minigen.bench import Row
from minigen.metrics import evaluate_images
from minigen.train.imagegpt import SampleOptions, draw

SETTINGS = [
    *({"guidance": scale} for scale in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)),
    *({"guidance": scale, "schedule": "linear"} for scale in (2.0, 3.0)),
    *({"guidance": 1.5, "temperature": value} for value in (0.9, 0.95, 1.05)),
    *({"guidance": 1.5, "top_p": value} for value in (0.95, 0.98)),
    {"guidance": 1.5, "top_k": 200},
]


def rows(quick: bool) -> list[Row]:
    """Two rows for each setting: the distance, and the class accuracy."""
    count, found, floor = 72 if quick else 500, [], None
    for setting in SETTINGS[:1] if quick else SETTINGS:
        images, labels = draw("imagegpt", SampleOptions(count=count, seed=1, **setting))
        figures = evaluate_images(images, labels=labels, subsets=1)["figures"]
        case = ", ".join(f"{name} {value}" for name, value in setting.items())
        distance, right = figures["FD-landscape"], figures["class accuracy"]
        note = f"{count} images, extractor {distance['hash']}"
        found += [Row(case, distance["value"], "FD", note=note),
                  Row(case, right["value"], "accuracy", note=note)]
        floor = distance["floor"]
    return [*found, Row("real images", floor, "FD", note=f"{count} images")]
