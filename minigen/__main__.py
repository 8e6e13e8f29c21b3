"""The command line: `python -m minigen COMMAND ...`; `--help` works after each."""

import argparse
import importlib
import json
import math
import os
import pkgutil
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

COMMANDS = """\
  train CHAPTER     train the model of a chapter, such as `train pixelgpt --preset demo`
  sample MODEL      generate images; MODEL: a run's folder, a shipped model, OWNER/NAME
  evaluate X        compare images, or those of a model, with real ones: distances etc.
  extract-codes     encode a data set or a folder of images once, to train on the codes
  info [MODEL]      describe this machine, the chapters and their presets, or a model
  ship RUN          copy a finished run into the repository's data/
  bench [NAME ...]  measure speed and memory against plain implementations, as ratios
  reproduce         train and measure every system of the book; run again to resume
"""


def chapters() -> list[str]:
    """The names of the training scripts."""
    import minigen.train

    return sorted(found.name for found in pkgutil.iter_modules(minigen.train.__path__))


def script(chapter: str):
    """The training script of a chapter; ValueError lists all if it is unknown."""
    if chapter not in chapters():
        raise ValueError(f"there is no chapter {chapter!r} to train; there are "
                         f"{', '.join(chapters())}")
    return importlib.import_module(f"minigen.train.{chapter}")


def option(arguments: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` among the arguments."""
    parser = argparse.ArgumentParser("minigen train", add_help=False,
                                     allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(arguments)[0], name)


def asked_for_help(arguments: list[str], usage: str) -> bool:
    """Print the usage and return True if asked for it; without a name, exit with it."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return True
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(usage)
    return False


def train(arguments: list[str]) -> None:
    """python -m minigen train CHAPTER [--preset NAME] [options]"""
    usage = (f"usage: {train.__doc__}\nchapters: {', '.join(chapters())}; "
             "`train CHAPTER --help` lists its options")
    if asked_for_help(arguments, usage):
        return
    import tyro

    from minigen.devices import is_main_process, pick_preset

    chapter, *rest = arguments
    module, preset = script(chapter), option(rest, "preset")
    preset = pick_preset() if preset is None else preset
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
        use = f"Generate with: python -m minigen sample {config.out}"
        if not hasattr(module, "sample"):
            use = f"Measure with: python -m minigen evaluate X --extractor {config.out}"
        print(f"{config.out} holds the checkpoint, images and result.json. {use}")


def end_processes() -> None:
    """Leave the process group, if this is one of several processes."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sample(arguments: list[str]) -> None:
    """python -m minigen sample MODEL [options]"""
    usage = (f"usage: {sample.__doc__}\n`sample MODEL --help` lists the options of its "
             "chapter")
    if asked_for_help(arguments, usage):
        return
    import tyro

    from minigen.checkpoints import read_config

    chapter = read_config(arguments[0])["model"].split(".")[-2]
    module = script(chapter)
    if not hasattr(module, "sample"):
        raise ValueError(f"{arguments[0]} is a model of {chapter}, which draws nothing")
    options = tyro.cli(module.SampleOptions, args=arguments[1:],
                       prog=f"minigen sample {arguments[0]}")
    print(module.sample(arguments[0], options))


@dataclass
class EvaluateOptions:
    """Measure images against a reference. A model also takes options of `sample`."""

    # a folder, an .npz file, or a data set's name; None: landscapes:val, or, for a
    # tokenizer or a decoder, which reconstruct images of val, landscapes:test
    reference: str | None = None
    json: bool = False  # print JSON, with everything that each figure depends on
    count: int | None = None  # images; None: 1000 of a model or a data set, else all
    # feature network: landscapes, landscapes-loss, inception, dinov2, or a run's folder
    extractor: str = "landscapes"
    training: str | None = None  # search these images for nearest neighbors
    size: int | None = None  # side to resize images to, in pixels; None: as is
    subsets: int = 5  # disjoint subsets of the images, for standard errors
    seed: int = 0  # of generated images, and of the subsets
    save: bool = False  # write the figures to the result file of the model's run


def evaluate(arguments: list[str]) -> None:
    """python -m minigen evaluate IMAGES [--reference IMAGES] [--json] [options]

    IMAGES: a folder of images, an .npz file with an array arr_0 as ADM writes it, a
    data set's name such as landscapes:test, or (the first only) a model.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        arguments = ["IMAGES", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: {evaluate.__doc__}")
    import tyro

    from minigen.data import BUILDERS
    from minigen.metrics import (
        evaluate_images,
        format_report,
        load_extractor,
        read_images,
    )
    from minigen.runs import keep_evaluation

    source, *rest = arguments
    options, more = tyro.cli(EvaluateOptions, args=rest, return_unknown_args=True,
                             prog=f"minigen evaluate {source}")
    extractor = load_extractor(options.extractor)  # fails early if it is missing
    if options.count is not None and options.count <= extractor.dim:
        raise ValueError(f"the {extractor.dim} features of this network need more than "
                         f"{extractor.dim} images, found --count {options.count}")
    for images in filter(None, (options.reference, options.training)):
        if images.partition(":")[0] not in BUILDERS:
            read_images(images)
    images, labels, about = measured_images(source, options, more)
    split = about.pop("split", "val")
    reference = options.reference or f"landscapes:{split}"
    report = about | evaluate_images(
        images, reference, extractor, labels, options.training,
        options.subsets, options.seed, options.size)
    report |= {"images": source, "options": more}
    if options.save:
        keep_evaluation(source, report)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(format_report(report))
    for name, value in about.items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")


def measured_images(source: str, options: EvaluateOptions, more: list[str]) -> tuple:
    """Images for `evaluate`, their labels or None, and a model's seconds per image."""
    from minigen.checkpoints import find_checkpoint, read_config
    from minigen.data import BUILDERS
    from minigen.landscapes import CLASSES
    from minigen.metrics import read_images

    count, path = options.count, Path(source)
    if source.partition(":")[0] in BUILDERS:
        count = count or 1000
    elif not path.suffix == ".npz" and not (
            path.is_dir() and not (path / "config.json").exists()):
        try:
            find_checkpoint(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{source} is no folder of images, no .npz file and no data set's name "
                f"({', '.join(BUILDERS)}), and {error}") from error
        chapter = read_config(source)["model"].split(".")[-2]
        module = script(chapter)
        if not hasattr(module, "draw"):
            raise ValueError(f"{source} is a model of {chapter}, which draws no images "
                             "to measure")
        import tyro

        known = {field.name for field in fields(module.SampleOptions)}
        given = {"count": count or 1000, "seed": options.seed}
        given = {name: value for name, value in given.items() if name in known}
        drawing = tyro.cli(module.SampleOptions, args=more,
                           prog=f"minigen evaluate {source}",
                           default=module.SampleOptions(**given))
        start = time.perf_counter()
        images, labels = module.draw(source, drawing)
        config = read_config(source)
        classes = config.get("classes")
        if isinstance(classes, int) and classes not in (0, len(CLASSES)):
            labels = None  # not the classes that the feature network knows
        again = chapter == "vq" or (chapter == "diffusion" and config["codebook_size"]
                                    and not drawing.prior)  # reconstructs images of val
        seconds = (time.perf_counter() - start) / len(images)
        about = {"seconds_per_image": seconds} | ({"split": "test"} if again else {})
        return images, labels, about
    if more:
        raise ValueError(f"{source} is not a model; there is no option {more[0]}: see "
                         "`python -m minigen evaluate --help`")
    return read_images(source, options.size, count), None, {}


@dataclass
class ExtractOptions:
    """Encode images once, into a folder of codes. Run again to resume."""

    data: str  # a data set's name, or a folder of images of any size
    tokenizer: str  # a run's folder, a shipped model, OWNER/NAME, or LlamaGen .pt file
    out: Path  # folder for the codes
    size: int = 256  # side of the square images that are encoded, in pixels
    split: Literal["train", "val", "test"] = "train"  # split of the data set
    length: int | None = None  # encode at most this many images
    seed: int = 0  # of the choice of images, or of the landscapes
    flip: bool = True  # also encode each image mirrored
    ten_crop: bool = False  # instead, as LlamaGen: corners and center, also mirrored
    crop_range: float = 1.1  # ten crops: resize images to this times `size` first
    batch_size: int = 32  # images that each process encodes at a time
    on_error: Literal["raise", "skip"] = "raise"  # fail on unreadable images, or skip


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
        "minigen info", description="Describe this machine, or a model.")
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
    from minigen.checkpoints import find_checkpoint, read_config, stored_shapes
    from minigen.files import read_json

    folder = find_checkpoint(model)
    print(json.dumps(read_config(model), indent=1))
    if (weights := folder / "model.safetensors").exists():
        shapes = stored_shapes(weights).values()
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


def reproduce(arguments: list[str]) -> int:
    """python -m minigen reproduce [--only NAME ...] [--preset NAME] [--minutes M]"""
    import tyro

    from minigen import reproduce

    options = tyro.cli(reproduce.ReproduceOptions, args=arguments,
                       prog="minigen reproduce")
    act = (reproduce.check if options.check else
           reproduce.sheet if options.sheet else reproduce.reproduce)
    return act(options, main)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status, 2 after a one-sentence error message."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "sample": sample, "evaluate": evaluate,
                "extract-codes": extract, "info": info, "ship": ship, "bench": bench,
                "reproduce": reproduce}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m minigen COMMAND ...\n\n{COMMANDS}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"minigen: there is no command {arguments[0]!r}\n\n{COMMANDS}",
              file=sys.stderr)
        return 2
    try:
        return commands[arguments[0]](arguments[1:]) or 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("MINIGEN_DEBUG"):
            raise
        print(f"minigen: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError) or any(
            words in str(error) for words in ("allocate memory", "out of memory"))
        if not full or os.environ.get("MINIGEN_DEBUG"):
            raise
        reason = str(error).partition("\n")[0]
        print("minigen: these settings need more memory than there is; choose a "
              f"smaller model, image or batch ({reason})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = {"train": "; --resume continues from the last saved state",
                "reproduce": "; the same command goes on"}.get(arguments[0], "")
        print(f"minigen: interrupted{hint}", file=sys.stderr)
        return 130  # as shells report SIGINT


if __name__ == "__main__":
    sys.exit(main())
