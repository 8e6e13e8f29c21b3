"""The command line: `python -m minigen COMMAND ...`; `--help` works after each."""

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
  train CHAPTER     train the model of a chapter, such as `train pixelgpt --preset demo`
  sample MODEL      generate images with a run's folder, a shipped model, or the hub's
  extract-codes     encode a data set or a folder of images once, to train on the codes
  info [MODEL]      what this machine has, the chapters and their presets; or a model
  ship RUN          copy a finished run into the repository's data/
  bench [NAME ...]  measure speed and memory against the plain way, as ratios in one run
"""


def chapters() -> list[str]:
    """The names of the training scripts."""
    import minigen.train

    return sorted(found.name for found in pkgutil.iter_modules(minigen.train.__path__))


def script(chapter: str):
    """The training script of a chapter; ValueError names those there are."""
    if chapter not in chapters():
        raise ValueError(f"there is no chapter {chapter!r} to train; there are "
                         f"{', '.join(chapters())}")
    return importlib.import_module(f"minigen.train.{chapter}")


def option(arguments: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` among the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(arguments)[0], name)


def train(arguments: list[str]) -> None:
    """python -m minigen train CHAPTER [--preset NAME] [options]"""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: {train.__doc__}\nchapters: {', '.join(chapters())}; "
                         "`train CHAPTER --help` lists its options")
    import tyro

    from minigen.devices import is_main_process, pick_preset

    chapter, *rest = arguments
    module, preset = script(chapter), option(rest, "preset") or pick_preset()
    if preset not in module.PRESETS:
        raise ValueError(f"{chapter} has no preset {preset!r}; it has "
                         f"{', '.join(module.PRESETS)}")
    config = tyro.cli(
        module.Config, default=module.PRESETS[preset], args=rest,
        prog=f"minigen train {chapter}",
        description=f"{module.__doc__}\n\nPresets: {', '.join(module.PRESETS)}. "
                    f"The defaults shown are those of {preset!r}.")
    result = module.main(config)
    end_processes()
    if is_main_process():
        print(json.dumps(result["metrics"], indent=1))
        print(f"{config.out} holds the checkpoint, images and result.json. Generate "
              f"with: python -m minigen sample {config.out}")


def end_processes() -> None:
    """Leave the group of processes, if this command was launched in one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sample(arguments: list[str]) -> None:
    """python -m minigen sample MODEL [options]"""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: {sample.__doc__}\n`sample MODEL --help` lists the "
                         "options of its chapter")
    import tyro

    from minigen.checkpoints import read_config

    module = script(read_config(arguments[0])["model"].split(".")[-2])
    options = tyro.cli(module.SampleOptions, args=arguments[1:],
                       prog=f"minigen sample {arguments[0]}")
    print(module.sample(arguments[0], options))


@dataclass
class ExtractOptions:
    """Encode images once, into a folder of codes. The same command resumes."""

    data: str  # a data set's name, or a folder of images of any size
    tokenizer: str  # a run's folder, a shipped model, OWNER/NAME, or LlamaGen's *.pt
    out: Path  # folder to write
    size: int = 256  # side of the square images that are encoded, in pixels
    split: Literal["train", "val", "test"] = "train"  # which images
    length: int | None = None  # at most this many of them
    seed: int = 0  # which ones these are
    flip: bool = True  # each image as it is, and mirrored
    ten_crop: bool = False  # LlamaGen's way: corners and center, each also mirrored
    crop_range: float = 1.1  # ten crops: the image is this many times as large
    batch_size: int = 32  # images encoded at a time, by each process
    on_error: Literal["raise", "skip"] = "raise"  # what to do with an unreadable image


def extract(arguments: list[str]) -> None:
    """python -m minigen extract-codes --data NAME --tokenizer NAME --out FOLDER [...]

    `torchrun --nproc_per_node N -m minigen extract-codes ...` divides the work.
    """
    import tyro

    from minigen.codes import extract_codes, images_done
    from minigen.devices import is_main_process

    options = tyro.cli(ExtractOptions, args=arguments, prog="minigen extract-codes")
    before, start = images_done(options.out), time.perf_counter()
    codes = extract_codes(**vars(options))
    end_processes()
    (images, variants, tokens), seconds = codes.codes.shape, time.perf_counter() - start
    speed = f"{(images - before) / seconds:.3g} images/s"
    if is_main_process():
        print(f"{options.out}: {images} images, {variants} variants of each, {tokens} "
              f"tokens each, {images * variants * tokens} in all; "
              + (speed if images > before else "all there already"))


def info(arguments: list[str]) -> None:
    """python -m minigen info [MODEL]"""
    parser = argparse.ArgumentParser(
        "minigen info", description="What this machine has, or what a model is.")
    parser.add_argument("model", nargs="?",
                        help="a run's folder, a shipped model, or OWNER/NAME")
    model = parser.parse_args(arguments).model
    if model is None:
        import torch

        import minigen
        from minigen.data import cache_root
        from minigen.devices import hardware, pick_device, pick_dtype, pick_preset

        device = pick_device()
        dtype = str(pick_dtype(device)).removeprefix("torch.")
        print(f"minigen {minigen.__version__}, torch {torch.__version__}, "
              f"python {sys.version.split()[0]}")
        print(f"machine   {hardware()}")
        print(f"trains    on {device}, in {dtype}, preset {pick_preset()}")
        print(f"images    drawn once into {cache_root()}")
        for name in chapters():
            print(f"chapter   {name}: presets {', '.join(script(name).PRESETS)}")
        return
    from safetensors import safe_open

    from minigen.checkpoints import find_checkpoint, read_config
    from minigen.files import read_json

    folder = find_checkpoint(model)
    print(json.dumps(read_config(model), indent=1))
    if (weights := folder / "model.safetensors").exists():
        with safe_open(weights, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        print(f"{sum(math.prod(shape) for shape in shapes):,} numbers, "
              f"{weights.stat().st_size / 1e6:.1f} MB")
    results = folder.resolve().parents[1] / "results" / f"{folder.name}.json"
    for result in (folder / "result.json", results):
        if result.exists():
            about = read_json(result)
            names = ("command", "hardware", "minutes", "date", "metrics")
            print(json.dumps({name: about[name] for name in names}, indent=1))


def ship(arguments: list[str]) -> None:
    """python -m minigen ship RUN [--data FOLDER] [--without-weights]"""
    parser = argparse.ArgumentParser(
        "minigen ship",
        description="Copy a finished run into data/, under the run's own name.")
    parser.add_argument("run", type=Path,
                        help="a folder that `train` wrote: CHAPTER-PRESET-VARIANT")
    parser.add_argument("--data", type=Path, default=Path("data"),
                        help="the repository's folder (default: data)")
    parser.add_argument("--without-weights", action="store_true",
                        help="only the result and its images")
    options = parser.parse_args(arguments)
    from minigen.runs import ship

    ship(options.run, options.data, not options.without_weights)
    kind = "results" if options.without_weights else "checkpoints"
    print(options.data / kind / options.run.name)


def bench(arguments: list[str]) -> None:
    """python -m minigen bench [NAME ...] [--quick] [--json]"""
    from minigen.bench import main

    main(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake in words or files is a sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "sample": sample, "extract-codes": extract,
                "info": info, "ship": ship, "bench": bench}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m minigen COMMAND ...\n\n{COMMANDS}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"minigen: there is no command {arguments[0]!r}\n\n{COMMANDS}",
              file=sys.stderr)
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
