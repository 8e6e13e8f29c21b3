"""How much cheaper chapter 8's coarse steps are, and what a step of drawing costs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minigen.bench import Row, medians
from minigen.codes import CodeItem
from minigen.devices import pick_dtype
from minigen.losses import linear_cross_entropy
from minigen.npp import NPP, SIZES, NPPConfig, patch_token_loss
from minigen.sampling import Guidance, sample
from minigen.transformer import unwrap

SIDES = (1, 2, 4)


def make(shape: dict, codes: int, side: int) -> NPP:
    """A model with random weights and LlamaGen's thousand classes."""
    torch.manual_seed(0)
    return NPP(NPPConfig(codebook_size=codes, height=side, width=side, classes=1000,
                         **shape))


def training_times(model: NPP, images: int, repetitions: int) -> dict:
    """Seconds of a gradient at each patch side, and of an optimizer step."""
    batch = CodeItem(torch.randint(model.config.codebook_size, (images, model.length)),
                     torch.arange(images))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    steps = {side: lambda s=side: patch_token_loss(model, batch, s).backward()
             for side in SIDES}
    return medians(steps | {"optimizer": optimizer.step}, repetitions)


def repeated_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The patch loss with a copy of the logits for each token of a patch."""
    logits = (hidden @ weight.T)[:, :, None].expand(-1, -1, targets.shape[2], -1)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten())


def loss_times(codes: int, repetitions: int) -> tuple[dict, float]:
    """Seconds of both patch losses with gradients; largest difference of the gradients.

    The hidden states are narrow, since the output layer costs both losses the same.
    """
    dim = 8
    hidden = torch.randn(4, 64, dim, requires_grad=True)
    weight = torch.randn(codes, dim).div_(dim**0.5).requires_grad_()
    targets = torch.randint(codes, (4, 64, 4))
    losses = {"ours": linear_cross_entropy, "repeated": repeated_loss}
    gradients = [torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
                 for loss in losses.values()]
    apart = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    return medians({name: lambda f=loss: torch.autograd.grad(
        f(hidden, weight, targets), (hidden, weight)) for name, loss in losses.items()},
        repetitions), apart


@torch.inference_mode()
def products(model: NPP, rows: int) -> None:
    """Only the matrix products of one sampling step, for `rows` sequences."""
    x = torch.zeros(rows, model.config.dim, dtype=model.head.weight.dtype)
    for block in model.transformer.blocks:
        attention, mlp = block.attention, block.mlp
        F.linear(x, attention.qkv.weight)
        F.linear(x, attention.proj.weight)
        up = F.linear(x, mlp.gate.weight) * F.linear(x, mlp.up.weight)
        F.linear(up, mlp.down.weight)
    F.linear(x, model.head.weight)


@torch.inference_mode()
def drawing_step(model: NPP, images: int, position: int):
    """A function that draws the token at a position for `images` guided images."""
    step, guidance = unwrap(model.transformer), Guidance(2.0)
    cache = model.transformer.cache(2 * images, model.length)
    token = torch.zeros(2 * images, 1, dtype=torch.int64)

    def draw() -> None:
        cache.filled = position
        outputs = model.head(step(model.tokens(token), cache)[:, -1])
        sample(guidance.combine(outputs, position, model.length), top_k=2000)

    return torch.inference_mode()(draw)


def rows(quick: bool = False) -> list[Row]:
    """Chapter 8's table; `quick` takes two narrow layers instead of LlamaGen-B."""
    shape = {"depth": 2, "heads": 2, "dim": 64} if quick else SIZES["B"]
    codes, side, repetitions = (1024, 8, 2) if quick else (16384, 16, 3)
    targets = {2: None, 4: None} if quick else {2: 0.26, 4: 0.11}
    model = make(shape, codes, side)
    time = training_times(model.train(), 2 if quick else 4, repetitions)
    found = [Row(f"gradient at patch side {n} against side 1", time[n] / time[1], "x",
                 targets[n], False, f"{time[n]:.2f} s against {time[1]:.2f} s")
             for n in (2, 4)]
    coarse, fine = (time[n] + time["optimizer"] for n in (2, 1))
    found.append(Row("level 2 against next tokens, optimizer included",
                     (coarse + fine) / (2 * fine), "x", None if quick else 0.64, False))
    time, apart = loss_times(codes, repetitions)
    found += [Row("patch loss against copies of the logits, product aside",
                  time["repeated"] / time["ours"], "x", None if quick else 4,
                  note=f"{time['ours']:.3f} s against {time['repeated']:.3f} s"),
              Row("largest difference of their gradients", apart, "", 1e-5, False)]
    kinds = dict.fromkeys((torch.float32, pick_dtype(torch.device("cpu"))))
    for dtype in kinds:
        model = model.to(dtype).eval()
        kind = str(dtype).removeprefix("torch.")
        for images in (2, 8):
            time = medians({
                "ours": drawing_step(model, images, model.length // 2),
                "products": lambda n=images, m=model: products(m, 2 * n)},
                repetitions, 1 if quick else 10)
            each = time["ours"] * model.length / images
            found.append(Row(
                f"{kind}, {images} guided images: a step against its products alone",
                time["ours"] / time["products"], "x",
                1.5 if images == 2 and not quick else None, False,
                f"{1e3 * time['ours']:.1f} ms, {each:.2f} s per image of all tokens"))
    return found
