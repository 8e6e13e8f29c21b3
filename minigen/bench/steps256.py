"""How many steps MaskGIT needs for four times as many tokens.

Beside it is chapter 5's model, of the same tokenizer, size and training budget."""

from minigen.bench import Row
from minigen.bench.steps import compare

SETTINGS = [
    *({"steps": steps} for steps in (2, 4, 8, 16, 32, 64)),
    *({"steps": steps, "noise": 20.0} for steps in (8, 16, 32, 64)),
]


def rows(quick: bool) -> list[Row]:
    """Rows for 256 tokens: each setting, ImageGPT and real images."""
    return compare("tokens256", SETTINGS, 72 if quick else 250, quick)
