"""How fast chapter 3 draws and trains, against the document's loop, plain PyTorch and
chapter 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigen.bench import Row, medians
from minigen.patchgpt import PatchGPT, PatchGPTConfig
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.training import decay_groups

SIZE, PATCHES, VALUES = 64, 256, 48  # of an image in patches of 4 x 4


class DocumentPatchGPT(nn.Module):
    """The model as the document gives it, slips included."""

    def __init__(self, input_dim=VALUES, seq_len=PATCHES, dim=512, heads=8, depth=6):
        super().__init__()
        self.token_embed = nn.Linear(input_dim, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, seq_len, dim))
        layer = nn.TransformerEncoderLayer(d_model=dim, nhead=heads)
        self.transformer = nn.TransformerEncoder(
            layer, num_layers=depth, enable_nested_tensor=False)  # which only warns
        self.output_proj = nn.Linear(dim, input_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_embed(x) + self.pos_embed[:, : x.shape[1]]
        return self.output_proj(self.transformer(x))


class PlainPatchGPT(nn.Module):
    """Our transformer with the head `mse`, built from PyTorch's own layers."""

    def __init__(self, config: PatchGPTConfig):
        super().__init__()
        self.embed = nn.Linear(VALUES, config.dim)
        self.start = nn.Parameter(torch.zeros(config.dim))
        self.positions = nn.Parameter(torch.zeros(PATCHES, config.dim))
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, 4 * config.dim, 0.0, "gelu", batch_first=True,
            norm_first=True, bias=False)
        self.encoder = nn.TransformerEncoder(
            layer, config.depth, nn.LayerNorm(config.dim, bias=False),
            enable_nested_tensor=False)
        self.out = nn.Linear(config.dim, VALUES)
        mask = nn.Transformer.generate_square_subsequent_mask(PATCHES)
        self.register_buffer("mask", mask)

    def forward(self, patches: Tensor) -> Tensor:
        start = self.start.expand(len(patches), 1, -1)
        x = torch.cat([start, self.embed(2 * patches - 1)], dim=1)
        T = x.shape[1]
        x = x + self.positions[:T]
        return self.out(self.encoder(x, mask=self.mask[:T, :T], is_causal=True))

    @torch.no_grad()
    def copy(self, model: PatchGPT) -> "PlainPatchGPT":
        """Copy the weights of a `PatchGPT`, so that both give the same outputs."""
        self.embed.load_state_dict(model.embed.state_dict())
        self.out.load_state_dict(model.head.out.state_dict())
        self.start.copy_(model.class_embedding.weight[-1])
        self.positions.copy_(model.transformer.positions(0, PATCHES))
        self.encoder.norm.weight.copy_(model.transformer.norm.weight)
        blocks = model.transformer.blocks
        for theirs, ours in zip(self.encoder.layers, blocks, strict=True):
            theirs.self_attn.in_proj_weight.copy_(ours.attention.qkv.weight)
            theirs.self_attn.out_proj.weight.copy_(ours.attention.proj.weight)
            theirs.linear1.weight.copy_(ours.mlp.up.weight)
            theirs.linear2.weight.copy_(ours.mlp.down.weight)
            theirs.norm1.weight.copy_(ours.norm1.weight)
            theirs.norm2.weight.copy_(ours.norm2.weight)
        return self


class Step:
    """One optimizer step on a batch of patches."""

    def __init__(self, model: nn.Module, patches: Tensor):
        self.model, self.patches = model, patches
        groups = decay_groups(model, 0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def __call__(self) -> None:
        F.mse_loss(self.model(self.patches[:, :-1]), self.patches).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.inference_mode()
def document_seconds(
    model: DocumentPatchGPT, images: int, windows: int, repetitions: int
) -> float:
    """Seconds that the document's loop takes to draw `images` images.

    Steps are timed at evenly spaced lengths and integrated by the trapezoidal rule.
    """
    lengths = torch.linspace(1, PATCHES - 1, windows).long().tolist()
    inputs = {n: torch.rand(images, n, VALUES) for n in lengths}
    steps = {n: (lambda x=x: model(x)[:, -1:]) for n, x in inputs.items()}
    times = medians(steps, repetitions)
    times = torch.tensor([times[n] for n in lengths])
    return torch.trapezoid(times, torch.tensor(lengths, dtype=torch.float)).item()


@torch.inference_mode()
def cached_outputs(model: PatchGPT, patches: Tensor) -> Tensor:
    """The outputs of `model(patches)`, computed patch by patch with the cache."""
    cache = model.transformer.cache(len(patches))
    hidden = [model.transformer(model.inputs(patches, p, p + 1), cache)
              for p in range(patches.shape[1] + 1)]
    return model.head(torch.cat(hidden, dim=1))


def rows(quick: bool = False) -> list[Row]:
    """Chapter 3's table; `quick` takes 2 layers of width 128."""
    torch.manual_seed(0)
    dim, heads, depth = (128, 4, 2) if quick else (512, 8, 6)
    windows, repetitions = (4, 2) if quick else (9, 3)
    document = DocumentPatchGPT(dim=dim, heads=heads, depth=depth).eval()
    config = PatchGPTConfig(
        dim=dim, heads=heads, depth=depth, above=False, positions="learned")
    model = PatchGPT(config).eval()
    found = []
    for images, target in ((1, 5), (8, 10)):
        draw = {"ours": lambda n=images: model.generate_images(n)}
        ours = medians(draw, repetitions)["ours"]
        theirs = document_seconds(document, images, windows, repetitions)
        found.append(Row(
            f"{PATCHES} patches, {images} at once, cached against the document's loop",
            theirs / ours, "x", None if quick else target,
            note=f"{ours:.2f} s against {theirs:.1f} s, the latter integrated from "
                 f"{windows} lengths"))
    plain = PlainPatchGPT(config).copy(model)
    patches = torch.rand(4 if quick else 8, PATCHES, VALUES)
    with torch.inference_mode():
        outputs = model(patches[:, :-1])
        others = {"through the cache": cached_outputs(model, patches[:, :-1]),
                  "of the same in plain PyTorch": plain(patches[:, :-1])}
    for name, other in others.items():
        found.append(Row(f"largest difference of the outputs to those {name}",
                         (other - outputs).abs().max().item(), "", 1e-4, False))
    steps = {"ours": Step(model.train(), patches), "plain": Step(plain, patches)}
    time = medians(steps, repetitions if quick else 7)
    found.append(Row(
        "training step, time against the same in plain PyTorch",
        time["ours"] / time["plain"], "x", None if quick else 1.1, at_least=False,
        note=f"{time['ours'] * 1e3:.0f} ms against {time['plain'] * 1e3:.0f} ms"))

    small = {"dim": 128, "heads": 4, "depth": 4}
    size = SIZE // 2 if quick else SIZE
    pixels = PixelGPT(PixelGPTConfig(size=size, **small)).eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    draws = {"pixels": lambda: pixels.generate_images(prompt)}
    for head in ("mse", "gaussian", "logistic"):
        model = PatchGPT(PatchGPTConfig(height=size, width=size, head=head, **small))
        draws[head] = lambda model=model: model.generate_images(1)
    time = medians(draws, 1 if quick else 3)
    theirs = time.pop("pixels")
    for head, ours in time.items():
        found.append(Row(
            f"an image of {size} x {size} by {head}, against chapter 1's pixels, the "
            "same transformer", theirs / ours, "x",
            note=f"{ours:.2f} s against {theirs:.1f} s"))
    return found
