"""Quality of the images that chapter 10's decoders make of tokens, by steps.

Tokens are those of test images, and those that chapters 5 and 7 generate."""

import torch
from torch import Tensor

from minigen.bench import Row
from minigen.bench.sweep import Judge, as_rows, landscapes, named
from minigen.checkpoints import load
from minigen.devices import pick_device
from minigen.diffusion import Diffusion
from minigen.metrics import fine_detail
from minigen.runs import shipped
from minigen.sampling import Guidance
from minigen.vq import similarity

VARIANTS = ("tokens64", "tokens256")
UNITS = ("PSNR", "SSIM", "detail", "FD", "precision", "recall", "accuracy")
DECODING = [*({"steps": steps, "method": "euler"} for steps in (1, 2, 4, 8, 16, 50)),
            *({"steps": steps, "method": "heun"} for steps in (4, 8))]
PRIORS = {"ImageGPT": "imagegpt", "MaskGIT": "maskgit"}
SEVERAL = 8  # decodings of the same tokens, whose mean is measured, too


def decoded(model: Diffusion, tokens: Tensor, seed: int = 1, **options) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] that the model decodes from tokens (N, h, w)."""
    generator = torch.Generator(pick_device()).manual_seed(seed)
    return torch.cat([model.decode(part, generator, **options).cpu()
                      for part in tokens.split(100)])


def generated(chapter: str, variant: str, labels: Tensor, grid: tuple) -> Tensor:
    """Tokens (N, h, w) that a model of a chapter draws, guided by labels (N,)."""
    device = pick_device()
    prior, guidance = load(shipped(chapter, variant)).to(device), Guidance(2.0)
    generator = torch.Generator(device).manual_seed(1)
    return torch.cat([
        prior.generate(len(part), part, guidance=guidance, generator=generator)
        for part in labels.split(100)]).view(-1, *grid)


def decoding_rows(variant: str, judge: Judge, count: int, quick: bool) -> list[Row]:
    """Rows for the tokens of test images, and for generated ones."""
    device = pick_device()
    tokenizer = load(shipped("vq", variant)).to(device)
    model = load(shipped("diffusion", variant)).to(device)
    images, labels = landscapes("test", count)
    found, note = [], f"{count} images, extractor {judge.extractor.hash}"
    best = {"steps": 2 if quick else 8, "method": "euler"}

    def add(case: str, drawn: Tensor, real: Tensor | None, labels: Tensor) -> None:
        figures = judge(drawn, labels)
        if real is not None:
            close = similarity(drawn, real)
            figures |= {"PSNR": close["psnr"], "SSIM": close["ssim"],
                        "detail": fine_detail(drawn, real)}
        found.extend(as_rows(f"{variant}, {case}", figures, UNITS, note))

    def plain(tokens: Tensor) -> Tensor:
        return torch.cat([tokenizer.decode(part).cpu() for part in tokens.split(100)])

    tokens = torch.cat([
        tokenizer.encode(part.to(device)) for part in images.split(100)])
    add("VQ decoder", plain(tokens), images, labels)
    for setting in DECODING[:1] if quick else DECODING:
        add(named(setting), decoded(model, tokens, **setting), images, labels)
    mean = sum(decoded(model, tokens, seed, **best) for seed in range(SEVERAL))
    add(f"mean of {SEVERAL}", mean / SEVERAL, images, labels)

    asked = torch.arange(count) % 9
    for name, chapter in PRIORS.items():
        tokens = generated(chapter, variant, asked, model.grid)
        add(f"{name} and VQ decoder", plain(tokens), None, asked)
        add(f"{name} and diffusion", decoded(model, tokens, **best), None, asked)
    return found


def rows(quick: bool) -> list[Row]:
    """Rows for both decoders, then for real images."""
    count = 72 if quick else 500
    judge = Judge(landscapes("val", count if quick else 1000)[0])
    note = f"{count} images, extractor {judge.extractor.hash}"
    found = [row for variant in (VARIANTS[:1] if quick else VARIANTS)
             for row in decoding_rows(variant, judge, count, quick)]
    return found + as_rows(
        "real images", judge(*landscapes("test", count)), UNITS, note)
