"""What each part of LlamaGen's block is worth: bits and seconds at nearly equal sizes.

Each run predicts the next token, on the same images, with two seeds."""

import tempfile
from pathlib import Path

from minigen.bench import Row
from minigen.bench.schedules import configuration
from minigen.train import npp
from minigen.training import read_log

GPT2 = {"norm": "layer", "mlp": "gelu", "positions": "rowcol"}
BLOCKS = {
    "GPT-2's block": GPT2,
    "with RMSNorm": GPT2 | {"norm": "rms"},
    "with SwiGLU": GPT2 | {"mlp": "swiglu"},
    "with rotary positions": GPT2 | {"positions": "rope2d"},
    "LlamaGen's block": {},
}


def rows(quick: bool) -> list[Row]:
    """Rows for each block and seed."""
    found, steps = [], {} if quick else {"steps": 300}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if quick else 2):
            for name, block in BLOCKS.items():
                run = {"level": 1} | steps | block
                config = configuration(name, run, seed, quick, Path(folder))
                metrics = npp.main(config)["metrics"]
                figures = {"bits": metrics["bits_per_token"],
                           "parameters": metrics["parameters"],
                           "s": read_log(config.out)[-1]["seconds"]}
                found += [Row(f"{name}, seed {seed}", value, unit,
                              note=f"{config.steps} steps")
                          for unit, value in figures.items()]
    return found
