"""How fast chapter 7 generates, against its own forward passes and against ImageGPT."""

import torch
from torch import Tensor

from minigen.bench import Row, medians
from minigen.devices import pick_dtype
from minigen.imagegpt import ImageGPT, ImageGPTConfig
from minigen.maskgit import MaskGIT, MaskGITConfig, still_masked
from minigen.sampling import Guidance

SHAPE = {"codebook_size": 16384, "classes": 1000, "dim": 880, "heads": 11, "depth": 12}
QUICK = SHAPE | {"codebook_size": 1024, "dim": 64, "heads": 2, "depth": 2}


def models(shape: dict, side: int, dtype=torch.float32) -> tuple[MaskGIT, ImageGPT]:
    """Both models of one shape over side x side tokens, with random weights."""
    torch.manual_seed(0)
    grid = shape | {"height": side, "width": side}
    pair = MaskGIT(MaskGITConfig(**grid)), ImageGPT(ImageGPTConfig(**grid))
    return tuple(model.to(dtype).eval() for model in pair)


@torch.inference_mode()
def forwards(model: MaskGIT, labels: Tensor, steps: int, masking="cosine") -> None:
    """Only the forward passes of guided generation, without sampling.

    The output layer runs only where a token is masked.
    """
    rows = torch.cat([labels, torch.full_like(labels, model.config.classes)])
    tokens, left = torch.zeros(len(rows), model.length, dtype=torch.int64), model.length
    for step in range(1, steps + 1):
        tokens[:, :left] = model.mask_token
        model.head(model.hidden(tokens, rows)[:, :left])
        tokens[:, :left] = 0
        left = still_masked(model.length, left, step, steps, masking)


def rows(quick: bool = False) -> list[Row]:
    """Chapter 7's table; `quick` takes width 64 and 2 layers instead of 880 and 12."""
    shape, side = (QUICK, 8) if quick else (SHAPE, 16)
    repetitions, guidance, two = 2 if quick else 3, Guidance(2.0), torch.arange(2)
    maskgit, imagegpt = models(shape, side)
    size = sum(p.numel() for p in maskgit.parameters())
    case = f"{side**2} tokens, {size / 1e6:.0f}M parameters, 2 images, guided"

    time = medians({
        "ours": lambda: maskgit.generate(2, two, steps=12, guidance=guidance),
        "forwards": lambda: forwards(maskgit, two, 12)}, repetitions)
    found = [Row(f"{case}: 12 steps against their forward passes",
                 time["ours"] / time["forwards"], "x", None if quick else 1.1, False,
                 f"{time['ours']:.2f} s against {time['forwards']:.2f} s")]

    dtype = pick_dtype(torch.device("cpu"))
    fast = [model.to(dtype) for model in (maskgit, imagegpt)]
    time = medians({
        "maskgit": lambda: fast[0].generate(2, two, steps=8, guidance=guidance),
        "imagegpt": lambda: fast[1].generate(2, two, guidance=guidance)}, repetitions)
    amx, kind = torch.cpu._is_amx_tile_supported(), str(dtype).removeprefix("torch.")
    target, reason = 2, ""
    if quick or not amx:
        target, reason = None, "; no target: no bf16 matrix instructions, or quick"
    found.append(Row(f"{case}: ImageGPT with its cache against 8 steps in {kind}",
                     time["imagegpt"] / time["maskgit"], "x", target,
                     note=f"{time['imagegpt']:.2f} s against {time['maskgit']:.2f} s"
                          f"{reason}"))

    # chapter 5's size from here on: the document's claim, and where it stops holding
    shape = QUICK if quick else QUICK | {"dim": 512, "heads": 8, "depth": 6}
    maskgit, imagegpt = models(shape, 16 if quick else 32)
    time = medians({
        8: lambda: maskgit.generate(1, steps=8),
        12: lambda: maskgit.generate(1, steps=12),
        "imagegpt": lambda: imagegpt.generate(1)}, 1 if quick else repetitions)
    for steps in (8, 12):
        found.append(Row(
            f"{maskgit.length} tokens, one image: ImageGPT against {steps} steps",
            time["imagegpt"] / time[steps], "x",
            note=f"{time['imagegpt']:.2f} s against {time[steps]:.2f} s"))

    maskgit, imagegpt = models(shape, side)
    for images in (1, 2) if quick else (1, 2, 8, 16):
        time = medians({
            "maskgit": lambda n=images: maskgit.generate(n, steps=8),
            "imagegpt": lambda n=images: imagegpt.generate(n)}, repetitions)
        found.append(Row(
            f"{maskgit.length} tokens, {images} at once: ImageGPT against 8 steps",
            time["imagegpt"] / time["maskgit"], "x",
            note=f"{time['imagegpt'] / images:.3f} against "
                 f"{time['maskgit'] / images:.3f} s per image; below 1 ImageGPT wins"))
    return found
