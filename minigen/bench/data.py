"""How fast landscapes are drawn and read back."""

import tempfile
from itertools import cycle

from minigen.bench import Row, medians
from minigen.data import cached_landscapes, draw_landscape


def rows(quick: bool = False) -> list[Row]:
    """Images per second at 64 x 64 on one core, drawn and from the cache."""
    count = 20 if quick else 100
    with tempfile.TemporaryDirectory() as root:
        cached = cached_landscapes(64, count, root=root)
        drawn, read = cycle(range(count)), cycle(range(count))
        functions = {"draw": lambda: draw_landscape(next(drawn)),
                     "read": lambda: cached[next(read)]}
        seconds = medians(functions, 3 if quick else 7, repeat=count)
    return [
        Row("landscapes of 64 x 64 drawn on one core", 1 / seconds["draw"], "images/s",
            400),
        Row("the same, read from the memory-mapped cache", 1 / seconds["read"],
            "images/s"),
    ]
