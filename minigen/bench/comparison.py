"""Seconds per image of every system of the comparison, and whether it copies.

The models are those that ship, or your own in `runs`, with `evaluate`'s options."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minigen.bench import Row, medians
from minigen.bench.sweep import landscapes
from minigen.checkpoints import load
from minigen.data import load_dataset
from minigen.devices import pick_device
from minigen.metrics import load_extractor, nearest_neighbors
from minigen.sampling import Guidance
from minigen.systems import Measured, measured
from minigen.train.anytoany import draw_images
from minigen.train.imagegpt import find_tokenizer

TRAINING = 40_000  # images to search; some systems have seen more, each of them once
COUNT = 100  # drawn images whose neighbors are searched
RUNS = Path("runs")  # where `reproduce` trains what does not ship


def drawer(each: Measured) -> Callable[[int], Tensor]:
    """A function that draws a number of images with a system, whose models it loads."""
    device = pick_device()
    model = load(each.checkpoint(runs=RUNS)).to(device)
    guidance = Guidance(2.0)

    def labels(count: int) -> Tensor:
        return torch.arange(count, device=device) % 9

    if each.system.chapter == "pixelgpt":
        sky = model.tokenizer.encode(landscapes("val", 16)[0])[:, :1]
        return lambda count: model.generate_images(
            sky.repeat(-(-count // 16), 1)[:count])
    if each.system.chapter == "patchgpt":
        return lambda count: model.generate_images(
            count, labels(count), guidance=guidance)
    if each.system.name == "diffusion-classes":
        return lambda count: model.generate_images(
            count, labels(count), guidance=guidance, steps=16, method="euler")
    if each.system.chapter == "diffusion":
        prior = load(each.run.replace("diffusion", "imagegpt")).to(device)
        return lambda count: model.decode(
            prior.generate(count, labels(count), guidance=guidance).view(
                -1, *model.grid), steps=8, method="euler")
    tokenizer = find_tokenizer(each.run, model).to(device)
    if each.system.chapter == "anytoany":
        captions = [item.caption for item in load_dataset("landscapes", 64, "val", 100)]
        return lambda count: draw_images(
            model, tokenizer, zip(captions[:count]), guidance=guidance)
    return lambda count: model.generate_images(
        tokenizer, count, labels(count), guidance=guidance)


def rows(quick: bool = False) -> list[Row]:
    """Three rows for each system with a checkpoint: two of seconds, one of neighbors.

    "nearest" is the mean distance of drawn images to the nearest training image, in
    the features of chapter 6, divided by the same for real images that no model was
    trained on. A model that copies is far below 1.
    """
    there = [each for each in measured() if each.checkpoint(runs=RUNS)]
    if quick:
        there = [each for each in there if each.system.chapter == "imagegpt"][:1]
    extractor = load_extractor().to(pick_device())
    known, _ = landscapes("train", 200 if quick else TRAINING)
    known = torch.cat([extractor(part) for part in known.split(500)])

    def neighbor(images: Tensor) -> float:
        return nearest_neighbors(extractor(images), known)[0].mean().item()

    usual, found = neighbor(landscapes("test", 500)[0]), []
    for each in there:
        draw, slow = drawer(each), each.sequential > 1000
        cases = {"one at a time": 1, "sixteen at once": 16}
        taken = medians({case: partial(draw, count) for case, count in cases.items()},
                        1 if slow or quick else 5)
        found += [Row(f"{each.run}: {case}", taken[case] / count, "s")
                  for case, count in cases.items()]
        torch.manual_seed(0)
        count = 16 if slow or quick else COUNT
        images = torch.cat([draw(min(50, count - done)).cpu()
                            for done in range(0, count, 50)])
        found.append(Row(f"{each.run}: nearest", neighbor(images) / usual, "x",
                         note=f"{count} images, {len(known)} of training"))
    return found
