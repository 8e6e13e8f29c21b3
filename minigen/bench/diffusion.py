"""Seconds per image of chapter 10, against those of chapters 5 and 7 and of a decoder.

All are models that ship, guided by the class; those of tokens also decode them."""

import torch

from minigen.bench import Row, medians
from minigen.checkpoints import load
from minigen.devices import pick_device
from minigen.runs import shipped
from minigen.sampling import Guidance

STEPS = (4, 8, 16, 50)
VARIANT = "tokens64"


def rows(quick: bool = False) -> list[Row]:
    """Chapter 10's table; `quick` draws one image in few steps."""
    device, guidance, found = pick_device(), Guidance(2.0), []
    models = {name: load(shipped(name, variant)).to(device) for name, variant in (
        ("vq", VARIANT), ("imagegpt", VARIANT), ("maskgit", VARIANT))}
    generator = load(shipped("diffusion", "classes")).to(device)
    decoder = load(shipped("diffusion", VARIANT)).to(device)
    steps = STEPS[:1] if quick else STEPS
    for count in (1,) if quick else (1, 8, 16):
        labels = torch.arange(count, device=device) % 9
        tokens = torch.zeros(count, *decoder.grid, dtype=torch.int64, device=device)
        options = {"labels": labels, "guidance": guidance}
        functions = {
            "ImageGPT, 64 tokens": lambda n=count, o=options: models[
                "imagegpt"].generate_images(models["vq"], n, **o),
            "MaskGIT, 64 tokens in 8 steps": lambda n=count, o=options: models[
                "maskgit"].generate_images(models["vq"], n, steps=8, **o),
            "VQ decoder alone": lambda t=tokens: models["vq"].decode(t)}
        for number in steps:
            how = {"steps": number, "method": "euler"}
            functions[f"diffusion, {number} Euler steps"] = (
                lambda n=count, o=options | how: generator.generate_images(n, **o))
            functions[f"diffusion decoder alone, {number} Euler steps"] = (
                lambda t=tokens, h=how: decoder.decode(t, **h))
        time = medians(functions, 2 if quick else 5)
        found += [Row(f"{count} at once: {name}", value / count, "s per image")
                  for name, value in time.items()]
    return found
