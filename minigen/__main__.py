"""The command line: `python -m minigen COMMAND ...`; without one it lists them. `--help` after each says more."""

import argparse
import importlib
import json
import math
import os
import pkgutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

COMMANDS = """\
  train CHAPTER        train the model of a chapter, e.g. `train pixelgpt --preset demo`
  sample CHECKPOINT    draw pictures with a trained model: a folder that `train` wrote, or a name on the hub
  extract-codes        turn a data set or a folder of pictures into codes once, to train on them many times
  info [CHECKPOINT]    what this machine has, the chapters and their presets; or what a checkpoint is
  ship RUN             put a finished run into the repository's data/: checkpoint, result and pictures
  bench [NAME ...]     measure speed and memory against the plain way, as ratios within this run
"""


def chapters() -> list[str]:
    """The names of the training scripts."""
    import minigen.train

    return sorted(module.name for module in pkgutil.iter_modules(minigen.train.__path__))


def script(chapter: str):
    """The training script of a chapter; ValueError names those there are."""
    if chapter not in chapters():
        raise ValueError(f"there is no chapter {chapter!r} to train; there are {', '.join(chapters())}")
    return importlib.import_module(f"minigen.train.{chapter}")


def option(arguments: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` among the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(arguments)[0], name)


def train(arguments: list[str]) -> None:
    """python -m minigen train CHAPTER [--preset NAME] [options]"""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: {train.__doc__}\nchapters: {', '.join(chapters())}; `train CHAPTER --help` lists its options")
    import torch
    import tyro

    from minigen.training import is_main_process, pick_preset

    module, preset = script(arguments[0]), option(arguments[1:], "preset") or pick_preset()
    if preset not in module.PRESETS:
        raise ValueError(f"{arguments[0]} has no preset {preset!r}; it has {', '.join(module.PRESETS)}")
    config = tyro.cli(module.Config, default=module.PRESETS[preset], args=arguments[1:], prog=f"minigen train {arguments[0]}",
                      description=f"{module.__doc__}\n\nPresets: {', '.join(module.PRESETS)}. Shown are the defaults of {preset!r}.")
    result = module.main(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main_process():
        return
    print(json.dumps(result["metrics"], indent=1))
    print(f"{config.out}: the checkpoint, the pictures and result.json. Draw with: python -m minigen sample {config.out}")


def sample(arguments: list[str]) -> None:
    """python -m minigen sample CHECKPOINT [options]"""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: {sample.__doc__}\n`sample CHECKPOINT --help` lists the options of its chapter")
    import tyro

    from minigen.training import read_config

    module = script(read_config(arguments[0])["model"].split(".")[-2])
    options = tyro.cli(module.SampleOptions, args=arguments[1:], prog=f"minigen sample {arguments[0]}")
    print(module.sample(arguments[0], options))


@dataclass
class ExtractOptions:
    """Encode pictures once, into a folder of codes. The same command goes on where it was stopped."""

    data: str  # a data set's name, or a folder of pictures of any size
    tokenizer: str  # a folder that `train vq` wrote, OWNER/NAME on the hub, or a file of LlamaGen's, *.pt
    out: Path  # folder to write
    size: int = 256  # side of the square pictures that are encoded, in pixels
    split: Literal["train", "val", "test"] = "train"  # which pictures
    length: int | None = None  # at most so many of them
    seed: int = 0  # which ones these are
    flip: bool = True  # each picture as it is, and mirrored
    ten_crop: bool = False  # instead four corners and the middle, each as it is and mirrored, as LlamaGen does
    crop_range: float = 1.1  # ten crops: how many times as large as a crop the picture is
    batch_size: int = 32  # pictures encoded at a time, by each process
    processes: int = 1  # that share the work
    on_error: Literal["raise", "skip"] = "raise"  # at a picture that cannot be read: stop, or leave it out


def extract(arguments: list[str]) -> None:
    """python -m minigen extract-codes --data NAME --tokenizer NAME --out FOLDER [options]"""
    import tyro

    from minigen.codes import extract_codes, images_done

    options = tyro.cli(ExtractOptions, args=arguments, prog="minigen extract-codes")
    before, start = images_done(options.out), time.perf_counter()
    codes = extract_codes(**vars(options))
    (images, variants, tokens), seconds = codes.codes.shape, time.perf_counter() - start
    rate = f"{(images - before) / seconds:.3g} images/s" if images > before else "all there already"
    print(f"{options.out}: {images} images, {variants} variants of each, {tokens} tokens each, "
          f"{images * variants * tokens} in all; {rate}")


def info(arguments: list[str]) -> None:
    """python -m minigen info [CHECKPOINT]"""
    parser = argparse.ArgumentParser("minigen info", description="What this machine has, or what a checkpoint is.")
    parser.add_argument("checkpoint", nargs="?", help="a folder that `train` wrote, or OWNER/NAME on the hub")
    checkpoint = parser.parse_args(arguments).checkpoint
    if checkpoint is None:
        import torch

        import minigen
        from minigen.data import cache_root
        from minigen.training import hardware, pick_device, pick_dtype, pick_preset

        device = pick_device()
        print(f"minigen {minigen.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
        print(f"machine   {hardware()}")
        print(f"trains    on {device}, in {str(pick_dtype(device)).removeprefix('torch.')}, preset {pick_preset()}")
        print(f"pictures  drawn once into {cache_root()}")
        for name in chapters():
            print(f"chapter   {name}: presets {', '.join(script(name).PRESETS)}")
        return
    from minigen.training import read_config

    config = read_config(checkpoint)
    print(json.dumps(config, indent=1))
    if (weights := Path(checkpoint) / "model.safetensors").exists():
        from safetensors import safe_open

        with safe_open(weights, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        print(f"{sum(math.prod(shape) for shape in shapes):,} parameters, {weights.stat().st_size / 1e6:.1f} MB")
    if (result := Path(checkpoint) / "result.json").exists():
        about = json.loads(result.read_text())
        print(json.dumps({key: about[key] for key in ("command", "hardware", "minutes", "date", "metrics")}, indent=1))


def ship(arguments: list[str]) -> None:
    """python -m minigen ship RUN [--data FOLDER] [--without-weights]"""
    parser = argparse.ArgumentParser("minigen ship", description="Put a finished run into data/, under the run's own name.")
    parser.add_argument("run", type=Path, help="a folder that `train` wrote, named CHAPTER-PRESET-VARIANT")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the repository's folder (default: data)")
    parser.add_argument("--without-weights", action="store_true", help="only the result and its pictures")
    options = parser.parse_args(arguments)
    from minigen.training import read_config
    from minigen.training import ship as put

    module, _, name = read_config(options.run)["model"].rpartition(".")
    put(getattr(importlib.import_module(module), name), options.run, options.data, not options.without_weights)
    print(options.data / ("results" if options.without_weights else "checkpoints") / options.run.name)


def bench(arguments: list[str]) -> None:
    """python -m minigen bench [NAME ...] [--quick] [--json]"""
    from minigen.bench import main

    main(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake in its words or files is a sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "sample": sample, "extract-codes": extract, "info": info, "ship": ship, "bench": bench}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m minigen COMMAND ...\n\n{COMMANDS}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"minigen: there is no command {arguments[0]!r}\n\n{COMMANDS}", file=sys.stderr)
        return 2
    try:
        commands[arguments[0]](arguments[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("MINIGEN_DEBUG"):
            raise
        print(f"minigen: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
